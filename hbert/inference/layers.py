"""The layers of an encoder for inference: packed weights, norms folded into what reads them, sums in products.

``LN(x) = n(x) o w + b`` with n(x) the normalized row, so for a linear layer behind it, with weight W and bias c,
``LN(x) W^T + c = n(x) (W diag(w))^T + (c + W b)``: the norm needs no parameters. In additive attention this holds for
query and key, since the K-free form reads the layer's input through the key's weight only.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from hbert.layers import (
    Carry,
    HBertAdditiveAttention,
    HBertFeedForward,
    HBertMerge,
    HBertPostNormLayer,
    HBertPreNormLayer,
    HBertSelfAttention,
    stream_of,
)
from hbert.layout import PackedLayout
from hbert_kernels.nn import SubLNFeedForward

from .arithmetic import Affine, Arithmetic, Norm, Rows, affine, fold, own, whole
from .kernels import AdditiveCore
from .key_free import KeyFree


class Batch(NamedTuple):
    """What all layers of a forward pass are called with.

    Attributes:
        key_free: whether additive attention reads the layer's input as it is, beside the rows of it.
    """

    ops: Arithmetic
    layout: PackedLayout
    key_free: bool


def build(layer: nn.Module, name: str, activation: str, ops: Arithmetic) -> PreNorm | PostNorm:
    """What computes the same as a layer of an HBERT encoder in evaluation mode, with weights of its own.

    Args:
        name: of the layer, as linear layers are called in ``ops``.
        activation: of its feed-forward block.
    """
    if isinstance(layer, HBertPreNormLayer):
        return PreNorm(layer, name, activation, ops)
    assert isinstance(layer, HBertPostNormLayer)
    return PostNorm(layer, name, activation, ops)


def readers(attention: nn.Module) -> tuple[str, list[nn.Linear]]:
    """The linear layers that read a layer's input, and the name of the first of them in the attention."""
    if isinstance(attention, HBertAdditiveAttention):
        return "query", [attention.query, attention.key]
    assert isinstance(attention, HBertSelfAttention)
    return "qkv", [attention.qkv]


def _packed(ops: Arithmetic, norm: nn.Module | None, linear: nn.Linear) -> object:
    """A linear layer behind the norm inside of a branch, if there is one."""
    return ops.pack(*(affine(linear) if norm is None else fold(norm, linear)))


class _SelfAttention:
    """The attention of an S layer up to and with its output projection; ``qkv`` as its input wants it."""

    def __init__(self, module: HBertSelfAttention, ops: Arithmetic, qkv: Affine):
        self.num_heads = module.num_heads
        self.inner = None if module.norm is None else Norm(None, None, module.norm.eps)
        self.qkv, self.out = ops.pack(*qkv), _packed(ops, module.norm, module.out)

    def __call__(self, rows: Rows, batch: Batch, other: Tensor | None) -> Tensor:
        ops = batch.ops
        heads = ops.kernels.attention(ops.inner(self.qkv, rows), batch.layout, self.num_heads)
        inner = ops.rows(heads) if self.inner is None else ops.norm(heads, self.inner, keep=False)[0]
        return ops.linear(self.out, inner, other)


class _AdditiveAttention:
    """The attention of an A layer; it adds its query, so that the residual stream is not added here.

    Args:
        query, key: as the rows want them.
        core_key: as the layer's input wants it, which the K-free form reads beside the rows.
        scale: what makes rows of the layer's input, see :meth:`.arithmetic.Int8.read_stream`.
    """

    def __init__(
        self,
        module: HBertAdditiveAttention,
        ops: Arithmetic,
        query: Affine,
        key: Affine,
        core_key: Affine,
        scale: Tensor | None,
    ):
        query_att, key_att = (own(scorer.weight) for scorer in (module.query_att, module.key_att))
        eps = 1e-12 if module.norm is None else module.norm.eps
        heads, width = module.num_heads, module.query.out_features
        self.core = AdditiveCore(query_att, key_att, heads, width // heads, module.norm is not None, eps)
        self.query, self.key = ops.pack(*query), ops.pack(*key)
        self.key_free = KeyFree(self.core, core_key, self.key, scale, ops)
        self.transform = _packed(ops, module.norm, module.transform)

    def __call__(self, rows: Rows, x: Tensor, batch: Batch) -> Tensor:
        ops, layout, key_free = batch
        query = ops.linear(self.query, rows)
        if key_free:
            mixed = self.key_free(query, x, ops, layout)
        else:
            # Projected here, from packed weights: the core takes the key.
            mixed = ops.kernels.additive_attention(query, ops.linear(self.key, rows), self.core, None, layout)
        return ops.linear(self.transform, ops.rows(mixed), query)


class _FeedForward:
    """Both linear layers and what is between them; ``fc1`` as its input wants it."""

    def __init__(self, module: SubLNFeedForward | HBertFeedForward, fc1: Affine, activation: str, ops: Arithmetic):
        norm = None if isinstance(module, HBertFeedForward) else module.norm
        self.activation, self.inner_eps = activation, None if norm is None else norm.eps
        self.fc1, self.fc2 = ops.pack(*fc1), _packed(ops, norm, module.fc2)

    def __call__(self, rows: Rows, other: Tensor, ops: Arithmetic) -> Tensor:
        if self.inner_eps is None:
            inner = ops.activated(self.fc1, rows, self.activation)
        else:
            inner = ops.activation_norm(ops.inner(self.fc1, rows), self.inner_eps, self.activation)
        return ops.linear(self.fc2, inner, other)


def _attention(
    module: nn.Module, inputs: list[Affine], plain: list[Affine], scale: Tensor | None, ops: Arithmetic
) -> tuple[_SelfAttention | None, _AdditiveAttention | None]:
    """An attention of either type; ``inputs`` are its :func:`readers` for rows, ``plain`` for the layer's input."""
    if isinstance(module, HBertAdditiveAttention):
        query, key = inputs
        return None, _AdditiveAttention(module, ops, query, key, plain[1], scale)
    assert isinstance(module, HBertSelfAttention)
    return _SelfAttention(module, ops, *inputs), None


class PreNorm:
    """A layer in style sub_ln or pre_ln."""

    def __init__(self, layer: HBertPreNormLayer, name: str, activation: str, ops: Arithmetic):
        self.branch = None if layer.conv is None else whole(layer.conv)
        first, linears = readers(layer.attention)
        self.norm, inputs = ops.read(layer.attention_norm, linears, f"{name}.attention.{first}")
        self.attention, self.additive = _attention(layer.attention, inputs, inputs, None, ops)
        self.ffn_norm, (fc1,) = ops.read(layer.ffn_norm, [layer.ffn.fc1], f"{name}.ffn.fc1")
        self.ffn = _FeedForward(layer.ffn, fc1, activation, ops)

    def __call__(self, carry: Carry, batch: Batch) -> Carry:
        ops = batch.ops
        rows, x, stream = self._attention_input(carry, batch)
        if self.additive is not None:
            carry = self.additive(rows, x, batch), stream
        else:
            assert self.attention is not None
            carry = self.attention(rows, batch, stream), None
        rows, _, stream = ops.norm_of_stream(carry, self.ffn_norm, keep=False)
        return self.ffn(rows, stream, ops), None

    def _attention_input(self, carry: Carry, batch: Batch) -> tuple[Rows, Tensor, Tensor]:
        """The normalized stream as rows and, where that is read too, as it is; and the stream."""
        ops, layout, key_free = batch
        keep = self.additive is not None and key_free
        if self.branch is not None:
            stream, norm = stream_of(carry), self.branch
            x = ops.kernels.conv_layer_norm(stream, norm.weight, norm.bias, norm.taps, layout.cu_seqlens, norm.eps)
            carry = x, stream
        if self.norm.taps is None:
            return ops.norm_of_stream(carry, self.norm, keep)
        stream = stream_of(carry)
        return *ops.conv_norm(stream, self.norm, layout, keep), stream


class PostNorm:
    """A layer in style post_ln or merge. The output of a norm is the residual stream, so that its parameters stay."""

    def __init__(self, layer: HBertPostNormLayer, name: str, activation: str, ops: Arithmetic):
        first, linears = readers(layer.attention)
        self.scale, inputs = ops.read_stream(linears, f"{name}.attention.{first}")
        self.attention, self.additive = _attention(layer.attention, inputs, [*map(affine, linears)], self.scale, ops)
        self.merge = None if layer.merge is None else _Merge(layer.merge, ops)
        self.ffn_scale, (fc1,) = ops.read_stream([layer.ffn.fc1], f"{name}.ffn.fc1")
        self.ffn = _FeedForward(layer.ffn, fc1, activation, ops)
        self.norms = whole(layer.attention_norm), whole(layer.ffn_norm)

    def __call__(self, carry: Carry, batch: Batch) -> Carry:
        ops, layer_norm = batch.ops, batch.ops.kernels.layer_norm
        first, second = self.norms
        y = layer_norm(self._attend(carry[0], batch), first.weight, first.bias, first.eps)
        z = self.ffn(ops.rows(y, self.ffn_scale), y, ops)
        return layer_norm(z, second.weight, second.bias, second.eps), None

    def _attend(self, x: Tensor, batch: Batch) -> Tensor:
        """x + the branch."""
        rows = batch.ops.rows(x, self.scale)
        if self.attention is not None:
            if self.merge is None:
                return self.attention(rows, batch, x)
            return self.merge(x, self.attention(rows, batch, None), batch.ops)
        assert self.additive is not None
        branch = self.additive(rows, x, batch)
        return branch + x if self.merge is None else self.merge(x, branch, batch.ops)


class _Merge:
    def __init__(self, module: HBertMerge, ops: Arithmetic):
        self.norm, self.out = Norm(None, None, module.norm.eps), _packed(ops, module.norm, module.out)

    def __call__(self, x: Tensor, branch: Tensor, ops: Arithmetic) -> Tensor:
        rows, _ = ops.norm(ops.kernels.concatenate(x, branch), self.norm, keep=False)
        return ops.linear(self.out, rows, x)
