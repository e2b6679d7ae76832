"""The layers of an encoder for inference: packed weights, norms folded into what reads them, sums in products.

``LN(x) = n(x) o w + b`` with n(x) the normalized row, so for a linear layer behind it, with weight W and bias c,
``LN(x) W^T + c = n(x) (W diag(w))^T + (c + W b)``: the norm needs no parameters. In additive attention this holds for
query and key, since the K-free form reads the layer's input through the key's weight only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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
from hbert_kernels.nn import ConvLayerNorm, SubLNFeedForward
from hbert_kernels.ops.additive_attention import prefers_key_free

from .arithmetic import Arithmetic, Parameters, Rows, own


class Batch(NamedTuple):
    """What all layers of a forward pass are called with."""

    ops: Arithmetic
    layout: PackedLayout


class State(NamedTuple):
    """What travels between layers: a carry, and behind a norm the rows that linear layers read of it."""

    carry: Carry
    rows: Rows | None = None


def build(layer: nn.Module, activation: str, ops: Arithmetic) -> PreNorm | PostNorm:
    """What computes the same as a layer of an HBERT encoder in evaluation mode, with weights of its own.

    Raises:
        ValueError: it has a linear layer of a class that is not torch's, such as that of an adapter.
    """
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            kind = type(module)
            raise ValueError(f"its {name} is a {kind.__name__} of {kind.__module__}: merge or remove it first")
    if isinstance(layer, HBertPreNormLayer):
        return PreNorm(layer, activation, ops)
    assert isinstance(layer, HBertPostNormLayer)
    return PostNorm(layer, activation, ops)


def _fold(linear: nn.Linear, norm: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a linear layer, with the parameters of the norm in front of it inside."""
    if norm is None:
        return linear.weight, linear.bias
    weight = linear.weight.double()
    bias = weight @ norm.bias.double()
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    # float32: the folded weight is rounded once more, when it becomes that of its dtype.
    return (weight * norm.weight.double()).float(), bias.float()


class _SelfAttention:
    """The attention of an S layer up to and with its output projection."""

    def __init__(self, module: HBertSelfAttention, norm: Any, ops: Arithmetic):
        self.num_heads, self.inner = module.num_heads, module.norm
        self.qkv = ops.pack(*_fold(module.qkv, norm))
        self.out = ops.pack(*_fold(module.out, module.norm))

    def __call__(self, rows: Rows, batch: Batch, other: Tensor | None) -> Tensor:
        ops = batch.ops
        heads = ops.kernels.attention(ops.linear(self.qkv, rows), batch.layout, self.num_heads)
        inner = ops.rows(heads) if self.inner is None else ops.norm(heads, None, self.inner.eps, keep=False)[0]
        return ops.linear(self.out, inner, other)


class _AdditiveAttention:
    """The attention of an A layer; it adds its query, so that the residual stream is not added here.

    The K-free form reads the layer's input and the key's weight as they are, so that weight is there twice.
    """

    def __init__(self, module: HBertAdditiveAttention, norm: Any, ops: Arithmetic):
        self.num_heads, self.sub_norm = module.num_heads, module.norm is not None
        self.eps = 1e-12 if module.norm is None else module.norm.eps
        self.scorer = "dense" if isinstance(module.query_att, nn.Linear) else "per_head"
        self.query_att, self.key_att = (own(s.weight) for s in (module.query_att, module.key_att))
        self.query = ops.pack(*_fold(module.query, norm))
        weight, bias = _fold(module.key, norm)
        self.key = ops.pack(weight, bias)
        self.key_weight: Tensor | None = own(weight, ops.dtype)
        self.key_bias = None if bias is None else own(bias)
        self.transform = ops.pack(*_fold(module.transform, module.norm))

    def is_key_free(self, layout: PackedLayout) -> bool:
        """Whether a call reads the layer's input as it is, beside the rows of it."""
        return prefers_key_free(layout.positions.shape[0], layout.cu_seqlens.shape[0] - 1, self.scorer)

    def __call__(self, rows: Rows, x: Tensor, batch: Batch) -> Tensor:
        ops, weight, bias = batch.ops, self.key_weight, self.key_bias
        query = ops.linear(self.query, rows)
        if not self.is_key_free(batch.layout):
            # Projected here, from packed weights: the core takes the key.
            x, weight, bias = ops.linear(self.key, rows), None, None
        mixed = ops.kernels.additive_attention(
            query, x, self.query_att, self.key_att, batch.layout, self.num_heads, weight, bias, self.sub_norm, self.eps
        )
        return ops.linear(self.transform, ops.rows(mixed), query)


class _FeedForward:
    def __init__(self, module: SubLNFeedForward | HBertFeedForward, norm: Any, activation: str, ops: Arithmetic):
        self.activation = activation
        self.inner = None if isinstance(module, HBertFeedForward) else module.norm
        self.fc1 = ops.pack(*_fold(module.fc1, norm))
        self.fc2 = ops.pack(*_fold(module.fc2, self.inner))

    def __call__(self, rows: Rows, other: Tensor, ops: Arithmetic) -> Tensor:
        if self.inner is None:
            inner = ops.activated(self.fc1, rows, self.activation)
        else:
            inner = ops.activation_norm(ops.linear(self.fc1, rows), self.inner.eps, self.activation)
        return ops.linear(self.fc2, inner, other)


class PreNorm:
    """A layer in style sub_ln or pre_ln."""

    def __init__(self, layer: HBertPreNormLayer, activation: str, ops: Arithmetic):
        norm = layer.attention_norm
        self.branch = None if layer.conv is None else Parameters(layer.conv)
        # Behind it lies a border of zeros, so that its parameters cannot go into the product.
        self.conv = Parameters(norm) if isinstance(norm, ConvLayerNorm) else None
        self.eps, self.ffn_eps = norm.eps, layer.ffn_norm.eps
        folded = None if self.conv is not None else norm
        self.additive = self.attention = None
        if isinstance(layer.attention, HBertAdditiveAttention):
            self.additive = _AdditiveAttention(layer.attention, folded, ops)
        else:
            self.attention = _SelfAttention(layer.attention, folded, ops)
        self.ffn = _FeedForward(layer.ffn, layer.ffn_norm, activation, ops)

    def __call__(self, state: State, batch: Batch) -> State:
        ops, layout = batch
        keep = self.additive is not None and self.additive.is_key_free(layout)
        rows, x, stream = self._attention_input(state.carry, batch, keep)
        if self.additive is not None:
            carry: Carry = self.additive(rows, x, batch), stream
        else:
            assert self.attention is not None
            carry = self.attention(rows, batch, stream), None
        rows, _, stream = ops.norm_of_stream(carry, self.ffn_eps, keep=False)
        return State((self.ffn(rows, stream, ops), None))

    def _attention_input(self, carry: Carry, batch: Batch, keep: bool) -> tuple[Rows, Tensor, Tensor]:
        ops, layout = batch
        if self.branch is not None:
            stream = stream_of(carry)
            assert self.branch.taps is not None
            carry = ops.kernels.conv_layer_norm(
                stream, self.branch.weight, self.branch.bias, self.branch.taps, layout.cu_seqlens, self.branch.eps
            ), stream
        if self.conv is None:
            return ops.norm_of_stream(carry, self.eps, keep)
        stream = stream_of(carry)
        return *ops.conv_norm(stream, self.conv, layout, keep), stream


class PostNorm:
    """A layer in style post_ln or merge."""

    def __init__(self, layer: HBertPostNormLayer, activation: str, ops: Arithmetic):
        self.additive = self.attention = None
        if isinstance(layer.attention, HBertAdditiveAttention):
            self.additive = _AdditiveAttention(layer.attention, None, ops)
        else:
            self.attention = _SelfAttention(layer.attention, None, ops)
        self.merge = None if layer.merge is None else _Merge(layer.merge, ops)
        self.ffn = _FeedForward(layer.ffn, None, activation, ops)
        # Their outputs are the stream too, so that their parameters stay.
        self.norms = [Parameters(norm) for norm in (layer.attention_norm, layer.ffn_norm)]

    def __call__(self, state: State, batch: Batch) -> State:
        ops = batch.ops
        x, _ = state.carry
        rows = ops.rows(x) if state.rows is None else state.rows
        rows, y = ops.norm(self._attend(rows, x, batch), self.norms[0], self.norms[0].eps, keep=True)
        rows, z = ops.norm(self.ffn(rows, y, ops), self.norms[1], self.norms[1].eps, keep=True)
        return State((z, None), rows)

    def _attend(self, rows: Rows, x: Tensor, batch: Batch) -> Tensor:
        """x + the branch."""
        if self.attention is not None:
            if self.merge is None:
                return self.attention(rows, batch, x)
            return self.merge(x, self.attention(rows, batch, None), batch.ops)
        assert self.additive is not None
        branch = self.additive(rows, x, batch)
        return branch.add_(x) if self.merge is None else self.merge(x, branch, batch.ops)


class _Merge:
    def __init__(self, module: HBertMerge, ops: Arithmetic):
        self.eps, self.out = module.norm.eps, ops.pack(*_fold(module.out, module.norm))

    def __call__(self, x: Tensor, branch: Tensor, ops: Arithmetic) -> Tensor:
        rows, _ = ops.norm(torch.cat([x, branch], dim=-1), None, self.eps, keep=False)
        return ops.linear(self.out, rows, x)
