"""In what numbers an encoder computes: floating point throughout, or int8 in its linear layers and its token embedding.

Layers are written once, over what linear layers read: rows [T, H] as they are, or as int8 numbers with a scale for each
row. A norm in front of a linear layer gives its output in that form, in the same pass; ``keep`` asks it for the output
as it is, too, which is undefined without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hbert.layers import Carry
from hbert.layout import PackedLayout
from hbert_kernels import cpu_capability
from hbert_kernels.nn import ConvLayerNorm

from .embedding import Int8Embedding
from .kernels import Kernels
from .linear import Int8Linear, own_product_is_faster, pack
from .smoothing import smoothing_scale

# Instruction set levels whose kernels multiply bfloat16 numbers as such; the others widen them.
BFLOAT16_LEVELS = ("avx512_bf16", "avx512_amx")
# By arithmetic: KernelLinear or TorchLinear, or Int8Linear, and what that reads, a tensor or Int8Rows.
Packed = Any
Rows = Any
Affine = tuple[Tensor, "Tensor | None"]


class Norm(NamedTuple):
    """A norm as the kernels take it: parameters in float32, or none."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    taps: Tensor | None = None


def own(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy; what has one number a channel stays in float32 beside activations of any dtype."""
    return parameter.detach().to(dtype, copy=True)


def whole(norm: Any) -> Norm:
    """A norm with its parameters: where its output is the residual stream, or goes through a convolution."""
    return Norm(own(norm.weight), own(norm.bias), norm.eps, own(norm.conv_weight) if _has_conv(norm) else None)


def fold(norm: Any, linear: nn.Linear) -> Affine:
    """The weight and bias of a linear layer with the parameters of the norm in front of it inside, which needs none."""
    weight = linear.weight.double()
    bias = weight @ norm.bias.double()
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    # float32: the folded weight is rounded once more, when it becomes that of its dtype.
    return (weight * norm.weight.double()).float(), bias.float()


def affine(linear: nn.Linear) -> Affine:
    """The weight and bias of a linear layer."""
    return linear.weight, linear.bias


def _has_conv(norm: Any) -> bool:
    return isinstance(norm, ConvLayerNorm)


class Floating:
    """float32 or bfloat16: linear layers read activations as they are."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype):
        self.kernels, self.dtype = kernels, dtype
        self.packs_key_free = dtype == torch.bfloat16
        # Whether linear layers are kernels of our library, as all that a program calls.
        self.is_recordable = own_product_is_faster()

    def read(self, norm: Any, linears: Sequence[nn.Linear], name: str) -> tuple[Norm, list[Affine]]:
        """A norm of the residual stream, and the linear layers that read it; ``name`` is that of the first of these."""
        if _has_conv(norm):
            # Behind it lies a border of zeros, so that its parameters cannot go into the product.
            return whole(norm), [affine(linear) for linear in linears]
        return Norm(None, None, norm.eps), [fold(norm, linear) for linear in linears]

    def read_stream(self, linears: Sequence[nn.Linear], name: str) -> tuple[Tensor | None, list[Affine]]:
        """The same for linear layers that read the stream itself: what it is multiplied by for :meth:`rows`."""
        return None, [affine(linear) for linear in linears]

    def embedding(self, source: nn.Embedding) -> nn.Module:
        """A token embedding of its own."""
        return copy.deepcopy(source).to(self.dtype)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        """A linear layer, as the next two take it."""
        return pack(weight, bias, self.dtype)

    def linear(self, layer: Packed, rows: Rows, other: Tensor | None = None) -> Tensor:
        """``x W^T + b [+ other]``."""
        return layer(self.kernels, rows, other)

    def inner(self, layer: Packed, rows: Rows) -> Tensor:
        """``x W^T + b`` inside of a branch, where it may be rounded as far as what reads it rounds."""
        return self.linear(layer, rows)

    def activated(self, layer: Packed, rows: Rows, activation: str) -> Rows:
        """``act(x W^T + b)``, as a linear layer reads it."""
        return layer.activated(self.kernels, rows, activation)

    def rows(self, x: Tensor, scale: Tensor | None = None) -> Rows:
        """What a linear layer reads, where no norm gives it: x, or x o scale."""
        return x

    def norm(self, x: Tensor, norm: Norm, keep: bool) -> tuple[Rows, Tensor]:
        """A norm."""
        y = self.kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return y, y

    def norm_of_stream(self, carry: Carry, norm: Norm, keep: bool) -> tuple[Rows, Tensor, Tensor]:
        """The norm of the stream that a carry stands for; and the stream."""
        x, residual = carry
        if residual is None:
            return *self.norm(x, norm, keep), x
        y, total = self.kernels.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
        return y, y, total

    def conv_norm(self, x: Tensor, norm: Norm, layout: PackedLayout, keep: bool) -> tuple[Rows, Tensor]:
        """A norm and the short convolution behind it."""
        y = self.kernels.conv_layer_norm(x, norm.weight, norm.bias, norm.taps, layout.cu_seqlens, norm.eps)
        return y, y

    def activation_norm(self, x: Tensor, eps: float, activation: str) -> Rows:
        """``LN(act(x))`` without parameters."""
        return self.kernels.activation_layer_norm(x, eps, activation)


class Int8:
    """int8 weights, one scale for each output; activations quantised row by row where a linear layer reads them.

    Args:
        magnitudes: of the inputs of linear layers by their names, from :func:`.smoothing.input_magnitudes`.
    """

    # Of activations between linear layers, and of what is around the encoder.
    dtype = torch.float32
    packs_key_free = is_recordable = True

    def __init__(self, kernels: Kernels, magnitudes: Mapping[str, Tensor]):
        self.kernels, self.magnitudes = kernels, magnitudes
        # Queries, keys, values and what is between the feed-forward's layers are rounded to int8 or go into a softmax
        # next: half the bytes, and attention in bfloat16, where the processor has products of such numbers; elsewhere
        # that is no faster.
        self.inner_dtype = torch.bfloat16 if cpu_capability() in BFLOAT16_LEVELS else torch.float32

    def read(self, norm: Any, linears: Sequence[nn.Linear], name: str) -> tuple[Norm, list[Affine]]:
        # Channels are evened out by the parameters of the norm, at no cost.
        inverse, parameters = self.read_stream(linears, name)
        return whole(norm)._replace(weight=own(norm.weight) * inverse, bias=own(norm.bias) * inverse), parameters

    def read_stream(self, linears: Sequence[nn.Linear], name: str) -> tuple[Tensor, list[Affine]]:
        scale = smoothing_scale(self.magnitudes[name], [linear.weight for linear in linears])
        return 1 / scale, [(own(linear.weight) * scale, linear.bias) for linear in linears]

    def embedding(self, source: nn.Embedding) -> nn.Module:
        return Int8Embedding(source)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        return Int8Linear(weight, bias)

    def linear(self, layer: Packed, rows: Rows, other: Tensor | None = None) -> Tensor:
        return self.kernels.int8_linear(rows, layer.weight, layer.bias, other, torch.float32)

    def inner(self, layer: Packed, rows: Rows) -> Tensor:
        return self.kernels.int8_linear(rows, layer.weight, layer.bias, None, self.inner_dtype)

    def activated(self, layer: Packed, rows: Rows, activation: str) -> Rows:
        return self.kernels.quantize_rows(self.inner(layer, rows), activation)

    def rows(self, x: Tensor, scale: Tensor | None = None) -> Rows:
        return self.kernels.quantize_rows(x if scale is None else x * scale)

    def norm(self, x: Tensor, norm: Norm, keep: bool) -> tuple[Rows, Tensor]:
        return self.kernels.layer_norm_int8(x, norm.weight, norm.bias, norm.eps, keep)

    def norm_of_stream(self, carry: Carry, norm: Norm, keep: bool) -> tuple[Rows, Tensor, Tensor]:
        x, residual = carry
        if residual is None:
            return *self.norm(x, norm, keep), x
        return self.kernels.add_layer_norm_int8(x, residual, norm.weight, norm.bias, norm.eps, keep)

    def conv_norm(self, x: Tensor, norm: Norm, layout: PackedLayout, keep: bool) -> tuple[Rows, Tensor]:
        return self.kernels.conv_layer_norm_int8(
            x, norm.weight, norm.bias, norm.taps, layout.cu_seqlens, norm.eps, keep
        )

    def activation_norm(self, x: Tensor, eps: float, activation: str) -> Rows:
        return self.kernels.activation_layer_norm_int8(x, eps, activation)


Arithmetic = Floating | Int8
DTYPES = ("fp32", "bf16", "int8")
