"""Layer normalization of a gated product: the end of additive attention with sub-layer normalization."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import (
    cast,
    compute_dtype,
    gradient_like,
    new_statistics,
    present,
    rows_of_sequences,
    run,
    segment_ids,
    without_autocast,
)


def gated_layer_norm(
    x: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""``LN(x_t o gate_b)`` for every token t of sequence b.

    Args:
        x: packed tokens [T, H]; float32, bfloat16 or float64 (float16 on GPUs).
        gate: [B, H], one row per sequence (the global key of additive attention); its dtype may differ from x's.
        cu_seqlens: int32 [B+1], the first row of each sequence.
        weight, bias, eps: affine parameters [H] or None, and epsilon of the norm.

    Returns:
        [T, H] in x's dtype; rows behind cu_seqlens[-1] are zero. The product is not rounded before the norm.

    Raises:
        TypeError: unsupported dtype, or cu_seqlens is not int32.
        ValueError: a shape or device does not fit, or cu_seqlens is not increasing or out of range.
    """
    op = "gated_layer_norm"
    _check.packed(op, "x", x)
    _check.rows(op, x, weight=weight, bias=bias)
    _check.floating(op, x=x, gate=gate)
    _check.cu_seqlens(op, cu_seqlens, x.shape[0], x.device)
    _check.shape(op, "gate", gate, cu_seqlens.shape[0] - 1, x.shape[1])
    if _dispatch.select(op, x, gate, weight, bias) == "reference":
        return gated_layer_norm_reference(x, gate, cu_seqlens, weight, bias, eps)
    arguments = x, cast(gate, compute_dtype(x)), cu_seqlens, weight, bias, eps
    return run(_GatedLayerNorm, torch.ops.hbert_kernels.gated_layer_norm, *arguments)


@without_autocast
def gated_layer_norm_reference(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Plain torch, any device, float64-capable, differentiable, exportable."""
    acc = compute_dtype(x)
    alive = (segment_ids(cu_seqlens, x.shape[0]) < cu_seqlens.shape[0] - 1)[:, None]
    gated = torch.where(alive, x, 0).to(acc) * rows_of_sequences(gate.to(acc), cu_seqlens, x.shape[0])
    normed = F.layer_norm(gated, x.shape[1:], cast(weight, acc), cast(bias, acc), eps)
    return torch.where(alive, normed, 0).to(x.dtype)


def _forward_fake(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *new_statistics(x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), gradient_like(x, weight), gradient_like(x, bias)


_library.define(
    "gated_layer_norm(Tensor x, Tensor gate, Tensor cu_seqlens, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_library.define(
    "gated_layer_norm_backward(Tensor dy, Tensor x, Tensor gate, Tensor cu_seqlens, Tensor mean, Tensor rstd,"
    " Tensor? weight, Tensor? bias) -> (Tensor dx, Tensor dgate, Tensor dweight, Tensor dbias)",
    _backward_fake,
)
_dispatch.register("gated_layer_norm", "cpp", _dispatch.cpp_refusal)


class _GatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, rstd = torch.ops.hbert_kernels.gated_layer_norm(x, gate, cu_seqlens, weight, bias, eps)
        ctx.save_for_backward(x, gate, cu_seqlens, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        weight, bias = saved[5:]
        dx, dgate, dweight, dbias = torch.ops.hbert_kernels.gated_layer_norm_backward(dy, *saved)
        return dx, dgate, None, present(weight, dweight), present(bias, dbias), None
