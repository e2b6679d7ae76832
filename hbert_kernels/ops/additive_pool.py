"""Softmax pooling of each packed sequence, one distribution per head: the building block of additive attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import compute_dtype, run, to_padded, without_autocast


def additive_pool(
    x: Tensor, scorer: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, *, output: str = "slice"
) -> Tensor:
    r"""Attention pooling of each sequence with one softmax over its tokens per head.

    .. math:: \alpha_{tj} = \mathrm{softmax}_t\left(\frac{s_{tj}}{\sqrt{d}}\right), \qquad p_j = \sum_t \alpha_{tj}\,
    x_t

    (Wu et al. 2021, "Fastformer", arXiv 2108.09084, eq. 3-4), d = H/h. The score of token t under head j is

    * ``scorer`` [h, H]: the product of the whole row with row j (dense: the official Fastformer code);
    * ``scorer`` [B, h, H]: the same with a scorer of the token's own sequence (K-free additive attention);
    * ``scorer`` [h, d]: the product of the head's own slice with row j (the paper's text).

    Args:
        x: packed tokens [T, H]; float32, bfloat16 or float64 (float16 on GPUs).
        scorer: as above; its dtype may differ from x's.
        cu_seqlens: int32 [B+1], the first row of each sequence.
        max_seqlen: an upper bound of the sequence lengths.
        num_heads: h; must divide H.
        output: "slice": head j pools its own slice of x; "full": every head pools the whole row.

    Returns:
        "slice": [B, H]; "full": [B, h, H]. float32 (float64 for float64 inputs): a pooled row is small, and everything
        in the sequence depends on it. An empty sequence pools to zeros.

    Raises:
        TypeError: unsupported dtype, or cu_seqlens is not int32.
        ValueError: a shape, device or option does not fit, or cu_seqlens is not increasing or out of range.
    """
    op = "additive_pool"
    _check.packed(op, "x", x)
    _check.floating(op, x=x, scorer=scorer)
    head_dim = _check.heads(op, x.shape[1], num_heads)
    _check.cu_seqlens(op, cu_seqlens, x.shape[0], x.device, max_seqlen)
    num_seqs = cu_seqlens.shape[0] - 1
    forms = [(num_heads, x.shape[1]), (num_seqs, num_heads, x.shape[1]), (num_heads, head_dim)]
    # Of equal rank only: an exported program must not depend on whether there are as many sequences as heads.
    if tuple(scorer.shape) not in [form for form in forms if len(form) == scorer.dim()]:
        allowed = ", ".join(map(str, forms))
        raise ValueError(f"{op}: scorer has shape {tuple(scorer.shape)}, allowed: {allowed}")
    if output not in ("slice", "full"):
        raise ValueError(f"{op}: output is {output!r}, allowed: 'slice', 'full'")
    if _dispatch.select(op, x, scorer) == "reference":
        return additive_pool_reference(x, scorer, cu_seqlens, max_seqlen, num_heads, output)
    arguments = x, scorer.to(compute_dtype(x)), cu_seqlens, num_heads, output == "full", head_dim**-0.5
    return run(_AdditivePool, torch.ops.hbert_kernels.additive_pool, *arguments)


@without_autocast
def additive_pool_reference(
    x: Tensor, scorer: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, output: str
) -> Tensor:
    """Plain torch, any device, float64-capable, differentiable, exportable."""
    acc = compute_dtype(x)
    rows, valid = to_padded(x.to(acc), cu_seqlens, max_seqlen)
    slices = rows.unflatten(-1, (num_heads, -1))
    scorer = scorer.to(acc)
    if scorer.shape[-1] == x.shape[1]:
        scores = rows @ scorer.transpose(-1, -2)
    else:
        scores = torch.einsum("bnhd,hd->bnh", slices, scorer)
    scores = scores / slices.shape[-1] ** 0.5
    if valid is not None:
        scores = scores.masked_fill(~valid[..., None], torch.finfo(acc).min)
    alpha = scores.softmax(1)
    if valid is not None:
        alpha = alpha * valid[..., None]
    if output == "full":
        return alpha.transpose(1, 2) @ rows
    return torch.einsum("bnh,bnhd->bhd", alpha, slices).flatten(1)


def _forward_fake(
    x: Tensor, scorer: Tensor, cu_seqlens: Tensor, num_heads: int, full: bool, scale: float
) -> tuple[Tensor, Tensor]:
    num_seqs, hidden = cu_seqlens.shape[0] - 1, x.shape[1]
    shape = (num_seqs, num_heads, hidden) if full else (num_seqs, hidden)
    return scorer.new_empty(shape), scorer.new_empty(num_seqs, 2, num_heads)


def _backward_fake(
    dpooled: Tensor,
    x: Tensor,
    scorer: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    softmax: Tensor,
    num_heads: int,
    full: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scorer.new_empty(scorer.shape)


_library.define(
    "additive_pool(Tensor x, Tensor scorer, Tensor cu_seqlens, int num_heads, bool full, float scale)"
    " -> (Tensor pooled, Tensor softmax)",
    _forward_fake,
)
_library.define(
    "additive_pool_backward(Tensor dpooled, Tensor x, Tensor scorer, Tensor cu_seqlens, Tensor pooled, Tensor softmax,"
    " int num_heads, bool full, float scale) -> (Tensor dx, Tensor dscorer)",
    _backward_fake,
)


def _cpp_refusal(x: Tensor | None = None, scorer: Tensor | None = None) -> str | None:
    if scorer is not None and scorer.shape[-2] > _MAX_HEADS:
        return f"has at most {_MAX_HEADS} heads, got {scorer.shape[-2]}"
    return _dispatch.cpp_refusal(x, scorer)


_MAX_HEADS = 64
_dispatch.register("additive_pool", "cpp", _cpp_refusal)


class _AdditivePool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scorer: Tensor, cu_seqlens: Tensor, num_heads: int, full: bool, scale: float
    ) -> Tensor:
        pooled, softmax = torch.ops.hbert_kernels.additive_pool(x, scorer, cu_seqlens, num_heads, full, scale)
        ctx.save_for_backward(x, scorer, cu_seqlens, pooled, softmax)
        ctx.options = num_heads, full, scale
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpooled: Tensor) -> tuple[Tensor | None, ...]:
        dx, dscorer = torch.ops.hbert_kernels.additive_pool_backward(dpooled, *ctx.saved_tensors, *ctx.options)
        return dx, dscorer, None, None, None, None
