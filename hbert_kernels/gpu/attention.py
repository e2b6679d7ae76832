"""Self-attention of packed sequences on GPUs: torch's flash attention with cu_seqlens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._common import alive_rows


def _flash_inputs(qkv: Tensor, cu_seqlens: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys, values [T, h, d] and cu_seqlens; torch's kernel refuses strides inside a row or in cu_seqlens."""
    return *qkv.contiguous().unflatten(1, (3, num_heads, -1)).unbind(1), cu_seqlens.contiguous()


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Forward, with the log-sum-exp [h, T] of every row; arguments and results as :func:`hbert_kernels.attention`'s."""
    if cu_seqlens.shape[0] == 1:  # torch's kernel refuses a batch of no sequences
        num_tokens, width = qkv.shape
        return qkv.new_zeros(num_tokens, width // 3), qkv.new_zeros(num_heads, num_tokens, dtype=torch.float32)
    query, key, value, cu_seqlens = _flash_inputs(qkv, cu_seqlens, num_heads)
    out, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False
    )
    # Rows of no sequence are never written.
    return torch.where(alive_rows(qkv, cu_seqlens), out.flatten(1), 0), log_sum_exp


def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, log_sum_exp: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int
) -> Tensor:
    """The gradient [T, 3H] of qkv."""
    if cu_seqlens.shape[0] == 1:
        return qkv.new_zeros(qkv.shape)
    query, key, value, cu_seqlens = _flash_inputs(qkv, cu_seqlens, num_heads)
    # Without dropout no random numbers are drawn again.
    no_state = torch.zeros(2, dtype=torch.uint64, device=qkv.device)
    gradients = torch.ops.aten._flash_attention_backward(
        dout.unflatten(1, (num_heads, -1)), query, key, value, out.unflatten(1, (num_heads, -1)), log_sum_exp,
        cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, no_state, torch.empty_like(no_state),
    )  # fmt: skip
    return torch.where(alive_rows(qkv, cu_seqlens), torch.stack(gradients, 1).flatten(1), 0)
