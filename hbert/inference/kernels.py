"""The ops of an optimized encoder: public functions, or where the compiled kernels run, their ops without the checks.

The encoder's driver is Python, so what a call of an op costs counts: on few tokens, checking the arguments of an op
takes as long as computing it. Inputs are checked once, at the entry of the encoder; what layers pass on is right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import hbert_kernels
from hbert.layout import PackedLayout
from hbert_kernels import Int8Rows, PackedInt8Weight, PackedWeight
from hbert_kernels._dispatch import select
from hbert_kernels.ops._common import rows_of_sequences
from hbert_kernels.ops.activation_layer_norm import CODES

_OPS = torch.ops.hbert_kernels


# The weight and the bias of the key's projection.
AffineKey = tuple[Tensor, "Tensor | None"]


class AdditiveCore(NamedTuple):
    """What the core of additive attention is called with, beside activations: as the public function calls it."""

    query_att: Tensor
    key_att: Tensor
    num_heads: int
    sub_norm: bool
    eps: float


class Kernels:
    """The public functions: any device and backend. A second output of a norm is undefined without ``keep``."""

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return hbert_kernels.layer_norm(x, weight, bias, eps)

    @staticmethod
    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return hbert_kernels.add_layer_norm(x, residual, weight, bias, eps)

    @staticmethod
    def conv_layer_norm(x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float) -> Tensor:
        return hbert_kernels.conv_layer_norm(x, weight, bias, taps, cu_seqlens, eps)

    @staticmethod
    def activation_layer_norm(x: Tensor, eps: float, activation: str) -> Tensor:
        return hbert_kernels.activation_layer_norm(x, None, None, eps, activation=activation)

    @staticmethod
    def attention(qkv: Tensor, layout: PackedLayout, num_heads: int) -> Tensor:
        return hbert_kernels.attention(qkv, layout.cu_seqlens, layout.max_seqlen, num_heads)

    @staticmethod
    def additive_attention(
        query: Tensor, x: Tensor, core: AdditiveCore, key: AffineKey | None, layout: PackedLayout
    ) -> Tensor:
        """K-free with ``key``; without, x is the key."""
        weight, bias = key or (None, None)
        return hbert_kernels.additive_attention(
            query, x, core.query_att, weight, bias, core.key_att, layout.cu_seqlens, layout.max_seqlen, core.num_heads,
            sub_norm=core.sub_norm, eps=core.eps, form="direct" if key is None else "key_free",
        )  # fmt: skip

    @staticmethod
    def additive_pool(x: Tensor, scorer: Tensor, layout: PackedLayout, num_heads: int, full: bool) -> Tensor:
        output = "full" if full else "slice"
        return hbert_kernels.additive_pool(x, scorer, layout.cu_seqlens, layout.max_seqlen, num_heads, output=output)

    @staticmethod
    def gate(x: Tensor, gate: Tensor, core: AdditiveCore, layout: PackedLayout) -> Tensor:
        """Each row of x times the gate of its sequence, normalized if the core does that."""
        if core.sub_norm:
            return hbert_kernels.gated_layer_norm(x, gate, layout.cu_seqlens, eps=core.eps)
        return x * rows_of_sequences(gate.to(x.dtype), layout.cu_seqlens, x.shape[0])

    @staticmethod
    def packed_linear(
        x: Tensor, weight: PackedWeight, bias: Tensor | None, other: Tensor | None, activation: str | None = None
    ) -> Tensor:
        return hbert_kernels.packed_linear(x, weight, bias, other, activation=activation)

    @staticmethod
    def quantize_rows(x: Tensor, activation: str | None = None) -> Int8Rows:
        return hbert_kernels.quantize_rows(x, activation=activation)

    @staticmethod
    def int8_linear(
        x: Int8Rows, weight: PackedInt8Weight, bias: Tensor | None, other: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return hbert_kernels.int8_linear(x, weight, bias, other, out_dtype=out_dtype)

    @staticmethod
    def layer_norm_int8(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        return hbert_kernels.layer_norm_int8(x, weight, bias, eps, keep=keep)

    @staticmethod
    def add_layer_norm_int8(
        x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any, Tensor]:
        return hbert_kernels.add_layer_norm_int8(x, residual, weight, bias, eps, keep=keep)

    @staticmethod
    def conv_layer_norm_int8(
        x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        return hbert_kernels.conv_layer_norm_int8(x, weight, bias, taps, cu_seqlens, eps, keep=keep)

    @staticmethod
    def activation_layer_norm_int8(x: Tensor, eps: float, activation: str) -> Int8Rows:
        return hbert_kernels.activation_layer_norm_int8(x, None, None, eps, activation=activation)


def _code(activation: str | None) -> int | None:
    return None if activation is None else CODES[activation]


class CompiledKernels(Kernels):
    """The same from the compiled CPU library. It checks shapes and cu_seqlens again; dtypes and devices are ours."""

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return _OPS.layer_norm.default(x, weight, bias, eps)[0]

    @staticmethod
    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return _OPS.add_layer_norm.default(x, residual, weight, bias, eps)[:2]

    @staticmethod
    def conv_layer_norm(x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float) -> Tensor:
        return _OPS.conv_layer_norm.default(x, weight, bias, taps, cu_seqlens, eps)[0]

    @staticmethod
    def activation_layer_norm(x: Tensor, eps: float, activation: str) -> Tensor:
        return _OPS.activation_layer_norm.default(x, None, None, eps, CODES[activation], None)[0]

    @staticmethod
    def attention(qkv: Tensor, layout: PackedLayout, num_heads: int) -> Tensor:
        return _OPS.attention.default(qkv, layout.cu_seqlens, layout.max_seqlen, num_heads)[0]

    @staticmethod
    def additive_attention(
        query: Tensor, x: Tensor, core: AdditiveCore, key: AffineKey | None, layout: PackedLayout
    ) -> Tensor:
        query_att, key_att, num_heads, sub_norm, eps = core
        return _OPS.additive_attention.default(
            query, x, query_att, key_att, layout.cu_seqlens, num_heads, *(key or (None, None)), key is not None,
            None, None, sub_norm, eps,
        )[0]  # fmt: skip

    @staticmethod
    def additive_pool(x: Tensor, scorer: Tensor, layout: PackedLayout, num_heads: int, full: bool) -> Tensor:
        scale = (x.shape[1] // num_heads) ** -0.5
        return _OPS.additive_pool.default(x, scorer, layout.cu_seqlens, num_heads, full, scale)[0]

    @staticmethod
    def gate(x: Tensor, gate: Tensor, core: AdditiveCore, layout: PackedLayout) -> Tensor:
        if not core.sub_norm:
            return Kernels.gate(x, gate, core, layout)
        return _OPS.gated_layer_norm.default(x, gate, layout.cu_seqlens, None, None, core.eps)[0]

    @staticmethod
    def packed_linear(
        x: Tensor, weight: PackedWeight, bias: Tensor | None, other: Tensor | None, activation: str | None = None
    ) -> Tensor:
        return _OPS.packed_linear.default(x, *weight[:2], bias, other, _code(activation))

    @staticmethod
    def quantize_rows(x: Tensor, activation: str | None = None) -> Int8Rows:
        return Int8Rows(*_OPS.quantize_rows.default(x, _code(activation)))

    @staticmethod
    def int8_linear(
        x: Int8Rows, weight: PackedInt8Weight, bias: Tensor | None, other: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return _OPS.int8_linear.default(*x, *weight[:3], bias, other, out_dtype)

    @staticmethod
    def layer_norm_int8(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        values, scale, y = _OPS.layer_norm_int8.default(x, weight, bias, eps, keep)
        return Int8Rows(values, scale), y

    @staticmethod
    def add_layer_norm_int8(
        x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any, Tensor]:
        values, scale, y, total = _OPS.add_layer_norm_int8.default(x, residual, weight, bias, eps, keep)
        return Int8Rows(values, scale), y, total

    @staticmethod
    def conv_layer_norm_int8(
        x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        values, scale, y = _OPS.conv_layer_norm_int8.default(x, weight, bias, taps, cu_seqlens, eps, keep)
        return Int8Rows(values, scale), y

    @staticmethod
    def activation_layer_norm_int8(x: Tensor, eps: float, activation: str) -> Int8Rows:
        return Int8Rows(*_OPS.activation_layer_norm_int8.default(x, None, None, eps, CODES[activation], None))


def kernels_for(x: Tensor) -> type[Kernels]:
    """What runs on the activations x: the compiled kernels where all of them may, else the public functions."""
    # All kernels are for the same devices and dtypes, but attention refuses more.
    return CompiledKernels if select("attention", x) == "cpp" else Kernels
