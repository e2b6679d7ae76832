"""The layers of an encoder for inference: packed weights, norms folded into what reads them, sums in products.

``LN(x) = n(x) o w + b`` with n(x) the normalized row, so for a linear layer behind it, with weight W and bias c,
``LN(x) W^T + c = n(x) (W diag(w))^T + (c + W b)``: the norm needs no parameters. In additive attention this holds for
query and key, since the K-free form reads the layer's input through the key's weight only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from hbert_kernels import (
    activation_layer_norm,
    add_layer_norm,
    additive_attention,
    conv_layer_norm,
    layer_norm,
)
from hbert_kernels.nn import ConvLayerNorm, SubLNFeedForward

from .linear import PackedLinear

Layer = Callable[[Carry, PackedLayout], Carry]


def build(layer: nn.Module, dtype: torch.dtype) -> Layer:
    """What computes the same as a layer of an HBERT encoder in evaluation mode, with weights of its own."""
    if isinstance(layer, HBertPreNormLayer):
        return _PreNorm(layer, dtype)
    assert isinstance(layer, HBertPostNormLayer)
    return _PostNorm(layer, dtype)


def _own(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy. What has one number a channel stays in float32 beside activations of any dtype."""
    return parameter.detach().to(dtype, copy=True)


def _folded(linear: nn.Linear, norm: Any, dtype: torch.dtype) -> PackedLinear:
    """The linear layer, with the parameters of the norm in front of it inside; no norm: as it is."""
    weight, bias = _fold(linear, norm)
    return PackedLinear(weight, bias, dtype)


def _fold(linear: nn.Linear, norm: Any) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return linear.weight, linear.bias
    weight = linear.weight.double()
    bias = weight @ norm.bias.double()
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    # float32: the folded weight is rounded once more, when it becomes that of its dtype.
    return (weight * norm.weight.double()).float(), bias.float()


class _Conv:
    """``y + conv(y)``, y = LN(x), whose parameters stay: a border of zeros lies between them and the product."""

    def __init__(self, norm: ConvLayerNorm):
        self.weight, self.bias, self.taps = (_own(p) for p in (norm.weight, norm.bias, norm.conv_weight))
        self.eps = norm.eps

    def __call__(self, x: Tensor, layout: PackedLayout) -> Tensor:
        return conv_layer_norm(x, self.weight, self.bias, self.taps, layout.cu_seqlens, self.eps)


class _SelfAttention:
    """The attention of an S layer up to and with its output projection."""

    def __init__(self, module: HBertSelfAttention, norm: Any, dtype: torch.dtype):
        self.num_heads, self.inner = module.num_heads, module.norm
        self.qkv = _folded(module.qkv, norm, dtype)
        self.out = _folded(module.out, module.norm, dtype)

    def __call__(self, x: Tensor, layout: PackedLayout, other: Tensor | None) -> Tensor:
        heads = layout.attend(self.qkv(x), self.num_heads, 0.0)
        if self.inner is not None:
            heads = layer_norm(heads, None, None, self.inner.eps)
        return self.out(heads, other)


class _AdditiveAttention:
    """The attention of an A layer; it adds its query, so that ``other`` is not added here."""

    def __init__(self, module: HBertAdditiveAttention, norm: Any, dtype: torch.dtype):
        self.num_heads, self.sub_norm = module.num_heads, module.norm is not None
        self.eps = 1e-12 if module.norm is None else module.norm.eps
        self.query = _folded(module.query, norm, dtype)
        weight, bias = _fold(module.key, norm)
        self.key_weight = _own(weight, dtype)
        self.key_bias = None if bias is None else _own(bias)
        self.query_att, self.key_att = (_own(s.weight) for s in (module.query_att, module.key_att))
        self.transform = _folded(module.transform, module.norm, dtype)

    def __call__(self, x: Tensor, layout: PackedLayout) -> Tensor:
        query = self.query(x)
        mixed = additive_attention(
            query,
            x,
            self.query_att,
            self.key_weight,
            self.key_bias,
            self.key_att,
            layout.cu_seqlens,
            layout.max_seqlen,
            self.num_heads,
            sub_norm=self.sub_norm,
            eps=self.eps,
        )
        return self.transform(mixed, query)


class _FeedForward:
    def __init__(self, module: SubLNFeedForward | HBertFeedForward, norm: Any, dtype: torch.dtype):
        self.fc1 = _folded(module.fc1, norm, dtype)
        if isinstance(module, HBertFeedForward):
            self.activate: Callable[[Tensor], Tensor] = module.activation
            self.fc2 = _folded(module.fc2, None, dtype)
        else:
            inner, name = module.norm, module.norm.activation
            self.activate = lambda x: activation_layer_norm(x, None, None, inner.eps, activation=name)
            self.fc2 = _folded(module.fc2, inner, dtype)

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:
        return self.fc2(self.activate(self.fc1(x)), other)


class _PreNorm:
    """A layer in style sub_ln or pre_ln."""

    def __init__(self, layer: HBertPreNormLayer, dtype: torch.dtype):
        norm = layer.attention_norm
        self.branch = None if layer.conv is None else _Conv(layer.conv)
        self.conv = _Conv(norm) if isinstance(norm, ConvLayerNorm) else None
        self.eps, self.ffn_eps = norm.eps, layer.ffn_norm.eps
        folded = None if self.conv is not None else norm
        self.additive = self.attention = None
        if isinstance(layer.attention, HBertAdditiveAttention):
            self.additive = _AdditiveAttention(layer.attention, folded, dtype)
        else:
            self.attention = _SelfAttention(layer.attention, folded, dtype)
        self.ffn = _FeedForward(layer.ffn, layer.ffn_norm, dtype)

    def __call__(self, carry: Carry, layout: PackedLayout) -> Carry:
        if self.branch is not None:
            stream = stream_of(carry)
            carry = self.branch(stream, layout), stream
        if self.conv is not None:
            stream = stream_of(carry)
            normed = self.conv(stream, layout)
        else:
            normed, stream = _norm(carry, self.eps)
        if self.additive is not None:
            carry = self.additive(normed, layout), stream
        else:
            assert self.attention is not None
            carry = self.attention(normed, layout, stream), None
        normed, stream = _norm(carry, self.ffn_eps)
        return self.ffn(normed, stream), None


class _PostNorm:
    """A layer in style post_ln or merge."""

    def __init__(self, layer: HBertPostNormLayer, dtype: torch.dtype):
        self.additive = self.attention = None
        if isinstance(layer.attention, HBertAdditiveAttention):
            self.additive = _AdditiveAttention(layer.attention, None, dtype)
        else:
            self.attention = _SelfAttention(layer.attention, None, dtype)
        self.merge = None if layer.merge is None else _Merge(layer.merge, dtype)
        self.ffn = _FeedForward(layer.ffn, None, dtype)
        self.norms = [_Norm(norm) for norm in (layer.attention_norm, layer.ffn_norm)]

    def __call__(self, carry: Carry, layout: PackedLayout) -> Carry:
        x, _ = carry
        y = self.norms[0](self._attend(x, layout))
        return self.norms[1](self.ffn(y, y)), None

    def _attend(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """x + the branch."""
        if self.attention is not None:
            if self.merge is None:
                return self.attention(x, layout, x)
            return self.merge(x, self.attention(x, layout, None))
        assert self.additive is not None
        branch = self.additive(x, layout)
        return branch.add_(x) if self.merge is None else self.merge(x, branch)


class _Merge:
    def __init__(self, module: HBertMerge, dtype: torch.dtype):
        self.eps, self.out = module.norm.eps, _folded(module.out, module.norm, dtype)

    def __call__(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.out(layer_norm(torch.cat([x, branch], dim=-1), None, None, self.eps), x)


class _Norm:
    """A norm whose output is a residual stream too, so that its parameters stay."""

    def __init__(self, norm: Any):
        self.weight, self.bias, self.eps = _own(norm.weight), _own(norm.bias), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def _norm(carry: Carry, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized rows of a stream, without parameters, and the stream."""
    x, residual = carry
    if residual is None:
        return layer_norm(x, None, None, eps), x
    return add_layer_norm(x, residual, None, None, eps)
