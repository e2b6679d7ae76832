"""Layer normalization followed by a short depthwise convolution inside each sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import cast, compute_dtype, gradient_like, new_statistics, present, run, segment_ids, without_autocast


def conv_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, conv_weight: Tensor, cu_seqlens: Tensor, eps: float = 1e-5
) -> Tensor:
    r"""Layer normalization, then a residual depthwise convolution of k taps over the tokens of each sequence.

    .. math:: Y = \mathrm{LN}(x), \quad out_t = Y_t + \sum_{|j| \le k/2} w_j \circ Y_{t+j}

    where Y is zero outside the sequence: the convolution never crosses ``cu_seqlens``. It gives additive attention,
    which is permutation-equivariant, the local mixing that it lacks (ours, not in the HybridBERT paper).

    Args:
        x: packed tokens [T, H]; float32, bfloat16 or float64 (float16 on GPUs).
        weight, bias: affine parameters [H] of the norm, or None.
        conv_weight: [k, H], k odd; row i weighs the token at offset i - k//2.
        cu_seqlens: int32 [B+1], the first row of each sequence.
        eps: added to the variance.

    Returns:
        [T, H] in x's dtype; rows behind cu_seqlens[-1] are zero.

    Raises:
        TypeError: unsupported dtype, or cu_seqlens is not int32.
        ValueError: a shape or device does not fit, k is even, or cu_seqlens is not increasing or out of range.
    """
    op = "conv_layer_norm"
    _check.packed(op, "x", x)
    _check.rows(op, x, weight=weight, bias=bias)
    _check.floating(op, x=x, conv_weight=conv_weight)
    check_conv_weight(op, conv_weight, x.shape[1])
    _check.cu_seqlens(op, cu_seqlens, x.shape[0], x.device)
    if _dispatch.select(op, x, weight, bias, conv_weight) == "reference":
        return conv_layer_norm_reference(x, weight, bias, conv_weight, cu_seqlens, eps)
    arguments = x, weight, bias, conv_weight, cu_seqlens, eps
    return run(_ConvLayerNorm, torch.ops.hbert_kernels.conv_layer_norm, *arguments)


def check_conv_weight(op: str, conv_weight: Tensor, width: int) -> None:
    """``ValueError`` unless the taps are [k, width] with k odd."""
    if conv_weight.dim() != 2 or conv_weight.shape[0] % 2 == 0 or conv_weight.shape[1] != width:
        found = tuple(conv_weight.shape)
        raise ValueError(f"{op}: conv_weight must be [k, {width}] with k odd, got shape {found}")


@without_autocast
def conv_layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, conv_weight: Tensor, cu_seqlens: Tensor, eps: float
) -> Tensor:
    """Plain torch, any device, float64-capable, differentiable, exportable."""
    acc = compute_dtype(x)
    num_tokens, reach = x.shape[0], conv_weight.shape[0] // 2
    segment = segment_ids(cu_seqlens, num_tokens)
    alive = (segment < cu_seqlens.shape[0] - 1)[:, None]
    rows = torch.where(alive, x, 0).to(acc)
    normed = F.layer_norm(rows, x.shape[1:], cast(weight, acc), cast(bias, acc), eps)
    padded = F.pad(normed, (0, 0, reach, reach))
    padded_segment = F.pad(segment, (reach, reach), value=-1)
    out = normed
    for tap, tap_weight in enumerate(conv_weight.to(acc)):
        inside = (padded_segment[tap : tap + num_tokens] == segment)[:, None]
        out = out + tap_weight * torch.where(inside, padded[tap : tap + num_tokens], 0)
    return torch.where(alive, out, 0).to(x.dtype)


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, conv_weight: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *new_statistics(x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gradient_like(x, weight), gradient_like(x, bias), gradient_like(x, conv_weight)


_library.define(
    "conv_layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor conv_weight, Tensor cu_seqlens, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_library.define(
    "conv_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " Tensor conv_weight, Tensor cu_seqlens) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dconv_weight)",
    _backward_fake,
)
_dispatch.register("conv_layer_norm", "cpp", _dispatch.cpp_refusal)


class _ConvLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_weight: Tensor,
        cu_seqlens: Tensor,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.ops.hbert_kernels.conv_layer_norm(x, weight, bias, conv_weight, cu_seqlens, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, conv_weight, cu_seqlens)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        weight, bias = saved[3:5]
        dx, dweight, dbias, dconv = torch.ops.hbert_kernels.conv_layer_norm_backward(dy, *saved)
        return dx, present(weight, dweight), present(bias, dbias), dconv, None, None
