"""Softmax pooling of each packed sequence, one distribution per head: the building block of additive attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, _dispatch
from ._common import compute_dtype, to_padded, without_autocast


def additive_pool(
    x: Tensor,
    scorer: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    *,
    output: str = "slice",
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
    if tuple(scorer.shape) not in forms:
        allowed = ", ".join(map(str, forms))
        raise ValueError(f"{op}: scorer has shape {tuple(scorer.shape)}, allowed: {allowed}")
    if output not in ("slice", "full"):
        raise ValueError(f"{op}: output is {output!r}, allowed: 'slice', 'full'")
    _dispatch.select(op, x, scorer)
    return additive_pool_reference(x, scorer, cu_seqlens, max_seqlen, num_heads, output)


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
