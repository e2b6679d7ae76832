"""Bidirectional softmax self-attention over packed sequences, for the full-attention layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import _check, _dispatch
from ._common import from_padded, to_padded, without_autocast


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
    _dispatch.select(op, qkv)
    return attention_reference(qkv, cu_seqlens, max_seqlen, num_heads, dropout_p)


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
