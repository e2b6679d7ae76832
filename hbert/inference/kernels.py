"""The ops of an optimized encoder: public functions, or where the compiled kernels run, their ops without the checks.

Inputs are checked once, at the entry of the encoder; what layers pass on is right. The third kind calls nothing, but
writes down what the layers call, as a program that the compiled library runs without Python between two ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import hbert_kernels
from hbert.layout import PackedLayout
from hbert_kernels import Int8Rows, PackedInt8Weight, PackedWeight
from hbert_kernels._dispatch import select
from hbert_kernels._program import Recorder
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
    head_dim: int
    sub_norm: bool
    eps: float


class Kernels:
    """The public functions: any device and backend. A second output of a norm is undefined without ``keep``."""

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return hbert_kernels.layer_norm(x, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return hbert_kernels.add_layer_norm(x, residual, weight, bias, eps)

    def conv_layer_norm(self, x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float) -> Tensor:
        return hbert_kernels.conv_layer_norm(x, weight, bias, taps, cu_seqlens, eps)

    def activation_layer_norm(self, x: Tensor, eps: float, activation: str) -> Tensor:
        return hbert_kernels.activation_layer_norm(x, None, None, eps, activation=activation)

    def attention(self, qkv: Tensor, layout: PackedLayout, num_heads: int) -> Tensor:
        return hbert_kernels.attention(qkv, layout.cu_seqlens, layout.max_seqlen, num_heads)

    def additive_attention(
        self, query: Tensor, x: Tensor, core: AdditiveCore, key: AffineKey | None, layout: PackedLayout
    ) -> Tensor:
        """K-free with ``key``; without, x is the key."""
        weight, bias = key or (None, None)
        return hbert_kernels.additive_attention(
            query, x, core.query_att, weight, bias, core.key_att, layout.cu_seqlens, layout.max_seqlen, core.num_heads,
            sub_norm=core.sub_norm, eps=core.eps, form="direct" if key is None else "key_free",
        )  # fmt: skip

    def additive_pool(self, x: Tensor, scorer: Tensor, core: AdditiveCore, layout: PackedLayout, full: bool) -> Tensor:
        output = "full" if full else "slice"
        cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
        return hbert_kernels.additive_pool(x, scorer, cu_seqlens, longest, core.num_heads, output=output)

    def gate(self, x: Tensor, gate: Tensor, core: AdditiveCore, layout: PackedLayout) -> Tensor:
        """Each row of x times the gate of its sequence, normalized if the core does that."""
        if core.sub_norm:
            return hbert_kernels.gated_layer_norm(x, gate, layout.cu_seqlens, eps=core.eps)
        # The gate may be wider than x: rounded once, behind the product, as gate_rows of the compiled library does it.
        return (x * rows_of_sequences(gate, layout.cu_seqlens, x.shape[0])).to(x.dtype)

    def gated_scorers(self, g: Tensor, scorers: Tensor) -> Tensor:
        """[B, H] o [h, H] -> [B, h, H]."""
        return g[:, None] * scorers

    def rows_of_heads(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, h, H] -> [B h, H] in this dtype."""
        return x.flatten(0, 1).to(dtype)

    def heads_of_rows(self, x: Tensor, num_heads: int) -> Tensor:
        """[B h, H] -> [B, h, H], float32."""
        return x.unflatten(0, (-1, num_heads)).float()

    def own_slices(self, x: Tensor) -> Tensor:
        """[B, h, H] -> [B, H]: of each head its own slice."""
        slices = x.unflatten(2, (x.shape[1], -1))
        return slices.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)

    def concatenate(self, x: Tensor, y: Tensor) -> Tensor:
        """Two [T, H] -> [T, 2H]."""
        return torch.cat([x, y], dim=-1)

    def packed_linear(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, other: Tensor | None, activation: str | None = None
    ) -> Tensor:
        return hbert_kernels.packed_linear(x, weight, bias, other, activation=activation)

    def quantize_rows(self, x: Tensor, activation: str | None = None) -> Int8Rows:
        return hbert_kernels.quantize_rows(x, activation=activation)

    def int8_linear(
        self, x: Int8Rows, weight: PackedInt8Weight, bias: Tensor | None, other: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return hbert_kernels.int8_linear(x, weight, bias, other, out_dtype=out_dtype)

    def layer_norm_int8(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        return hbert_kernels.layer_norm_int8(x, weight, bias, eps, keep=keep)

    def add_layer_norm_int8(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any, Tensor]:
        return hbert_kernels.add_layer_norm_int8(x, residual, weight, bias, eps, keep=keep)

    def conv_layer_norm_int8(
        self, x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        return hbert_kernels.conv_layer_norm_int8(x, weight, bias, taps, cu_seqlens, eps, keep=keep)

    def activation_layer_norm_int8(self, x: Tensor, eps: float, activation: str) -> Int8Rows:
        return hbert_kernels.activation_layer_norm_int8(x, None, None, eps, activation=activation)


def _code(activation: str | None) -> int | None:
    return None if activation is None else CODES[activation]


class CompiledKernels(Kernels):
    """The same from the compiled CPU library. It checks shapes and cu_seqlens again; dtypes and devices are ours."""

    def _call(self, op: str, *arguments: Any) -> Any:
        return getattr(_OPS, op).default(*arguments)

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return self._call("layer_norm", x, weight, bias, eps)[0]

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._call("add_layer_norm", x, residual, weight, bias, eps)[:2]

    def conv_layer_norm(self, x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float) -> Tensor:
        return self._call("conv_layer_norm", x, weight, bias, taps, cu_seqlens, eps)[0]

    def activation_layer_norm(self, x: Tensor, eps: float, activation: str) -> Tensor:
        return self._call("activation_layer_norm", x, None, None, eps, CODES[activation], None)[0]

    def attention(self, qkv: Tensor, layout: PackedLayout, num_heads: int) -> Tensor:
        return self._call("attention", qkv, layout.cu_seqlens, layout.max_seqlen, num_heads)[0]

    def additive_attention(
        self, query: Tensor, x: Tensor, core: AdditiveCore, key: AffineKey | None, layout: PackedLayout
    ) -> Tensor:
        query_att, key_att, num_heads, _, sub_norm, eps = core
        return self._call(
            "additive_attention", query, x, query_att, key_att, layout.cu_seqlens, num_heads,
            *(key or (None, None)), key is not None, None, None, sub_norm, eps,
        )[0]  # fmt: skip

    def additive_pool(self, x: Tensor, scorer: Tensor, core: AdditiveCore, layout: PackedLayout, full: bool) -> Tensor:
        return self._call("additive_pool", x, scorer, layout.cu_seqlens, core.num_heads, full, core.head_dim**-0.5)[0]

    def gate(self, x: Tensor, gate: Tensor, core: AdditiveCore, layout: PackedLayout) -> Tensor:
        if not core.sub_norm:
            return super().gate(x, gate, core, layout)
        return self._call("gated_layer_norm", x, gate, layout.cu_seqlens, None, None, core.eps)[0]

    def packed_linear(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, other: Tensor | None, activation: str | None = None
    ) -> Tensor:
        return self._call("packed_linear", x, *weight[:2], bias, other, _code(activation))

    def quantize_rows(self, x: Tensor, activation: str | None = None) -> Int8Rows:
        return Int8Rows(*self._call("quantize_rows", x, _code(activation)))

    def int8_linear(
        self, x: Int8Rows, weight: PackedInt8Weight, bias: Tensor | None, other: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return self._call("int8_linear", *x, *weight[:3], bias, other, out_dtype)

    def layer_norm_int8(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        values, scale, y = self._call("layer_norm_int8", x, weight, bias, eps, keep)
        return Int8Rows(values, scale), y

    def add_layer_norm_int8(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any, Tensor]:
        values, scale, y, total = self._call("add_layer_norm_int8", x, residual, weight, bias, eps, keep)
        return Int8Rows(values, scale), y, total

    def conv_layer_norm_int8(
        self, x: Tensor, weight: Any, bias: Any, taps: Any, cu_seqlens: Tensor, eps: float, keep: bool
    ) -> tuple[Int8Rows, Any]:
        values, scale, y = self._call("conv_layer_norm_int8", x, weight, bias, taps, cu_seqlens, eps, keep)
        return Int8Rows(values, scale), y

    def activation_layer_norm_int8(self, x: Tensor, eps: float, activation: str) -> Int8Rows:
        return Int8Rows(*self._call("activation_layer_norm_int8", x, None, None, eps, CODES[activation], None))


class RecordedKernels(CompiledKernels):
    """The compiled kernels, to be called by a program: tensors that a call is given or returns are only their names.

    A recording holds for every batch: of a layout, cu_seqlens is the program's input, and max_seqlen is not read.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def _call(self, op: str, *arguments: Any) -> Any:
        return self._recorder.op(op, *arguments)

    def _step(self, name: str, *arguments: Any) -> Any:
        return self._recorder.step(name, *arguments)[0]

    def gate(self, x: Any, gate: Any, core: AdditiveCore, layout: PackedLayout) -> Any:
        if core.sub_norm:
            return super().gate(x, gate, core, layout)
        return self._step("gate_rows", x, gate, layout.cu_seqlens)

    def gated_scorers(self, g: Any, scorers: Tensor) -> Any:
        return self._step("gated_scorers", g, scorers)

    def rows_of_heads(self, x: Any, dtype: torch.dtype) -> Any:
        return self._step("rows_of_heads", x, dtype)

    def heads_of_rows(self, x: Any, num_heads: int) -> Any:
        return self._step("heads_of_rows", x, num_heads)

    def own_slices(self, x: Any) -> Any:
        return self._step("own_slices", x)

    def concatenate(self, x: Any, y: Any) -> Any:
        return self._step("concatenate", x, y)


def runs_compiled(x: Tensor) -> bool:
    """Whether the compiled kernels run on the activations x, all of them; else the public functions do."""
    # All kernels are for the same devices and dtypes, but attention refuses more.
    return select("attention", x) == "cpp"
