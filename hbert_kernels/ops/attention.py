"""Bidirectional softmax self-attention over packed sequences, for the full-attention layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import compute_dtype, from_padded, run, to_padded, without_autocast


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, *, dropout_p: float = 0.0) -> Tensor:
    r"""Self-attention inside each packed sequence (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    .. math:: O_j = \mathrm{softmax}\left(\frac{Q_j K_j^T}{\sqrt d}\right) V_j

    Args:
        qkv: [T, 3H], the projections side by side: queries, keys, values, each H = h*d wide and head-major; float32,
            bfloat16 or float64 (float16 on GPUs).
        cu_seqlens: int32 [B+1], the first row of each sequence.
        max_seqlen: an upper bound of the sequence lengths.
        num_heads: h; must divide H.
        dropout_p: probability that an attention weight is dropped; the caller passes 0 outside training.

    Returns:
        [T, H] in qkv's dtype; rows behind cu_seqlens[-1] are zero. The softmax is computed in float32 (float64 for
        float64).

    Raises:
        TypeError: unsupported dtype, or cu_seqlens is not int32.
        ValueError: a shape or device does not fit, dropout_p is not in [0, 1), or cu_seqlens is not increasing or out
            of range.
    """
    op = "attention"
    _check.packed(op, "qkv", qkv)
    _check.floating(op, qkv=qkv)
    if qkv.shape[1] % 3:
        raise ValueError(f"{op}: qkv must be [T, 3H], got shape {tuple(qkv.shape)}")
    _check.heads(op, qkv.shape[1] // 3, num_heads)
    _check.cu_seqlens(op, cu_seqlens, qkv.shape[0], qkv.device, max_seqlen)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if _dispatch.select(op, qkv, dropout_p, num_heads) == "reference":
        return attention_reference(qkv, cu_seqlens, max_seqlen, num_heads, dropout_p)
    return run(_Attention, torch.ops.hbert_kernels.attention, qkv, cu_seqlens, max_seqlen, num_heads)


@without_autocast
def attention_reference(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, dropout_p: float) -> Tensor:
    """torch's scaled_dot_product_attention on the padded batch: any device, float64-capable, exportable."""
    padded, valid = to_padded(qkv, cu_seqlens, max_seqlen)
    query, key, value = padded.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    mask = None
    if valid is not None:
        # An empty sequence attends to its (zero) padding: a softmax over nothing would give NaN.
        mask = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
    return from_padded(out.transpose(1, 2).flatten(2), cu_seqlens, qkv.shape[0])


# Read once, at import: a traced graph must find an answer here, not a foreign function.
_SCALAR = _library.cpu_capability() in ("scalar", "neon_dot")


def _cpp_refusal(qkv: Tensor | None = None, dropout_p: float = 0.0, num_heads: int | None = None) -> str | None:
    if dropout_p > 0:
        return f"has no dropout of attention weights, and dropout_p is {dropout_p}"
    if _SCALAR and qkv is not None and qkv.dtype != torch.float64:
        return "is 4 to 10 times slower than torch's attention at a level without vector code of its own"
    return _dispatch.cpp_refusal(qkv)


def _attention_fake(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int) -> tuple[Tensor, Tensor]:
    num_tokens, width = qkv.shape
    return qkv.new_empty(num_tokens, width // 3), qkv.new_empty(num_heads, num_tokens, dtype=compute_dtype(qkv))


def _attention_backward_fake(
    dout: Tensor, qkv: Tensor, out: Tensor, log_sum_exp: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int
) -> Tensor:
    return qkv.new_empty(qkv.shape)


_library.define(
    "attention(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, int num_heads) -> (Tensor out, Tensor log_sum_exp)",
    _attention_fake,
)
_library.define(
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor log_sum_exp, Tensor cu_seqlens, SymInt max_seqlen,"
    " int num_heads) -> Tensor dqkv",
    _attention_backward_fake,
)
_dispatch.register("attention", "cpp", _cpp_refusal)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int) -> Tensor:
        out, log_sum_exp = torch.ops.hbert_kernels.attention(qkv, cu_seqlens, max_seqlen, num_heads)
        ctx.save_for_backward(qkv, out, log_sum_exp, cu_seqlens)
        ctx.options = max_seqlen, num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dqkv = torch.ops.hbert_kernels.attention_backward(dout, *ctx.saved_tensors, *ctx.options)
        return dqkv, None, None, None
