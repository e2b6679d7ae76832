"""Layer normalization, plain and of a residual sum: the row kernel that every other norm extends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import (
    as_rows,
    cast,
    compute_dtype,
    gradient_like,
    new_statistics,
    present,
    rows_as,
    run,
    without_autocast,
)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    r"""Layer normalization over the last dimension.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \circ w + b

    with the mean and the (biased) variance of each row, computed in two passes (Ba et al. 2016, arXiv 1607.06450, eq.
    4).

    Args:
        x: [..., H], float32, bfloat16 or float64 (float16 on GPUs).
        weight: [H] or None (ones). Its dtype may differ from x's.
        bias: [H] or None (zeros).
        eps: added to the variance.

    Returns:
        [..., H] in x's dtype; statistics are float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not supported on the device, or float64 mixed with another dtype.
        ValueError: weight or bias is not [H] or lies on another device.
    """
    _check.rows("layer_norm", x, weight=weight, bias=bias)
    if _dispatch.select("layer_norm", x, weight, bias) == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    return rows_as(run(_LayerNorm, torch.ops.hbert_kernels.layer_norm, as_rows(x), weight, bias, eps), x)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    r"""Residual sum and its layer normalization in one pass: ``s = x + residual; y = LN(s)``.

    Args:
        x: [..., H], the output of a branch.
        residual: [..., H], the residual stream; its dtype may differ from x's (autocast: bfloat16 branch, float32
            stream).
        weight, bias, eps: as in :func:`layer_norm`.

    Returns:
        ``(y, s)``: y in x's dtype, s in the promoted dtype of x and residual. y is the norm of s as stored.

    Raises:
        TypeError, ValueError: as in :func:`layer_norm`; residual has not the shape of x.
    """
    _check.rows("add_layer_norm", x, weight=weight, bias=bias)
    _check.floating("add_layer_norm", x=x, residual=residual)
    _check.shape("add_layer_norm", "residual", residual, *x.shape)
    if _dispatch.select("add_layer_norm", x, residual, weight, bias) == "reference":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    arguments = as_rows(x), as_rows(residual), weight, bias, eps
    y, total = run(_AddLayerNorm, torch.ops.hbert_kernels.add_layer_norm, *arguments, outputs=2)
    return rows_as(y, x), rows_as(total, x)


@without_autocast
def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Plain torch, any device, float64-capable, differentiable, exportable."""
    acc = compute_dtype(x)
    return F.layer_norm(x.to(acc), x.shape[-1:], cast(weight, acc), cast(bias, acc), eps).to(x.dtype)


@without_autocast
def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Plain torch, as :func:`layer_norm_reference`."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps).to(x.dtype), total


def _layer_norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *new_statistics(x)


def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, mean, rstd = _layer_norm_fake(x, weight, bias, eps)
    return y, total, mean, rstd


def _layer_norm_backward_fake(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gradient_like(x, weight), gradient_like(x, bias)


_library.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    _layer_norm_fake,
)
_library.define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
    _add_layer_norm_fake,
)
_library.define(
    "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward_fake,
)
_dispatch.register("layer_norm", "cpp", _dispatch.cpp_refusal)
_dispatch.register("add_layer_norm", "cpp", _dispatch.cpp_refusal)


def _backward(
    saved: tuple[Tensor, ...], dy: Tensor, dtotal: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, mean, rstd, weight, bias = saved
    dx, dweight, dbias = torch.ops.hbert_kernels.layer_norm_backward(dy, dtotal, x, mean, rstd, weight, bias)
    return dx, present(weight, dweight), present(bias, dbias)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.hbert_kernels.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx.saved_tensors, dy, None), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, rstd = torch.ops.hbert_kernels.add_layer_norm(x, residual, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, mean, rstd, weight, bias)
        ctx.dtypes = x.dtype, residual.dtype
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        if dy is None:
            dy = torch.zeros_like(saved[0], dtype=ctx.dtypes[0])
        dsum, dweight, dbias = _backward(saved, dy, dtotal)
        dx, dresidual = (dsum.to(dtype) for dtype in ctx.dtypes)
        return dx, dresidual, dweight, dbias, None
