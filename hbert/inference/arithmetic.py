"""In what numbers an encoder computes: floating point throughout, or int8 in its linear layers.

Layers are written once, over what linear layers read: rows [T, H] as they are, or as int8 numbers with a scale for each
row. A norm in front of a linear layer gives its output in that form, in the same pass; ``keep`` asks it for the output
as it is, too, which is undefined without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbert.layers import Carry
from hbert.layout import PackedLayout
from hbert_kernels.nn import ConvLayerNorm

from .kernels import Kernels
from .linear import Int8Linear, PackedLinear

# By arithmetic: PackedLinear or Int8Linear, and what that reads, a tensor or Int8Rows.
Packed = Any
Rows = Any


class Parameters:
    """The parameters of a norm; they stay in float32 beside activations of any dtype.

    Args:
        norm: nothing of it is shared.
    """

    def __init__(self, norm: Any):
        self.weight, self.bias, self.eps = own(norm.weight), own(norm.bias), norm.eps
        self.taps = own(norm.conv_weight) if isinstance(norm, ConvLayerNorm) else None


def own(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy."""
    return parameter.detach().to(dtype, copy=True)


class Floating:
    """float32 or bfloat16: linear layers read activations as they are."""

    def __init__(self, kernels: type[Kernels], dtype: torch.dtype):
        self.kernels, self.dtype = kernels, dtype

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        """A linear layer, as the next two take it."""
        return PackedLinear(weight, bias, self.dtype)

    def linear(self, layer: Packed, rows: Rows, other: Tensor | None = None) -> Tensor:
        """``x W^T + b [+ other]``."""
        return layer(rows, other)

    def activated(self, layer: Packed, rows: Rows, activation: str) -> Rows:
        """``act(x W^T + b)``, as a linear layer reads it."""
        return layer(rows, activation=activation)

    def rows(self, x: Tensor) -> Rows:
        """What a linear layer reads, where no norm gives it."""
        return x

    def norm(self, x: Tensor, norm: Parameters | None, eps: float, keep: bool) -> tuple[Rows, Tensor]:
        """A norm, with parameters or without."""
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        y = self.kernels.layer_norm(x, weight, bias, eps)
        return y, y

    def norm_of_stream(self, carry: Carry, eps: float, keep: bool) -> tuple[Rows, Tensor, Tensor]:
        """The norm, without parameters, of the stream that a carry stands for; and the stream."""
        x, residual = carry
        if residual is None:
            return *self.norm(x, None, eps, keep), x
        y, total = self.kernels.add_layer_norm(x, residual, eps)
        return y, y, total

    def conv_norm(self, x: Tensor, norm: Parameters, layout: PackedLayout, keep: bool) -> tuple[Rows, Tensor]:
        """A norm and the short convolution behind it."""
        assert norm.taps is not None
        y = self.kernels.conv_layer_norm(x, norm.weight, norm.bias, norm.taps, layout.cu_seqlens, norm.eps)
        return y, y

    def activation_norm(self, x: Tensor, eps: float, activation: str) -> Rows:
        """``LN(act(x))`` without parameters."""
        return self.kernels.activation_layer_norm(x, eps, activation)


class Int8:
    """int8 weights, one scale for each output; activations quantised row by row where a linear layer reads them."""

    # Of activations between linear layers, and of what is around the encoder.
    dtype = torch.float32

    def __init__(self, kernels: type[Kernels]):
        self.kernels = kernels

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        return Int8Linear(weight, bias)

    def linear(self, layer: Packed, rows: Rows, other: Tensor | None = None) -> Tensor:
        return self.kernels.int8_linear(rows, layer.weight, layer.bias, other)

    def activated(self, layer: Packed, rows: Rows, activation: str) -> Rows:
        return self.kernels.quantize_rows(self.linear(layer, rows), activation)

    def rows(self, x: Tensor) -> Rows:
        return self.kernels.quantize_rows(x)

    def norm(self, x: Tensor, norm: Parameters | None, eps: float, keep: bool) -> tuple[Rows, Tensor]:
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        return self.kernels.layer_norm_int8(x, weight, bias, eps, keep)

    def norm_of_stream(self, carry: Carry, eps: float, keep: bool) -> tuple[Rows, Tensor, Tensor]:
        x, residual = carry
        if residual is None:
            return *self.norm(x, None, eps, keep), x
        return self.kernels.add_layer_norm_int8(x, residual, eps, keep)

    def conv_norm(self, x: Tensor, norm: Parameters, layout: PackedLayout, keep: bool) -> tuple[Rows, Tensor]:
        assert norm.taps is not None
        return self.kernels.conv_layer_norm_int8(
            x, norm.weight, norm.bias, norm.taps, layout.cu_seqlens, norm.eps, keep
        )

    def activation_norm(self, x: Tensor, eps: float, activation: str) -> Rows:
        return self.kernels.activation_layer_norm_int8(x, eps, activation)


Arithmetic = Floating | Int8
DTYPES = ("fp32", "bf16", "int8")


def arithmetic(dtype: str, kernels: type[Kernels]) -> Arithmetic:
    """One of :data:`DTYPES`, by the kernels given."""
    if dtype == "int8":
        return Int8(kernels)
    return Floating(kernels, torch.bfloat16 if dtype == "bf16" else torch.float32)
