"""attention, 12 heads of 64, against F.scaled_dot_product_attention on the padded projection [B, N, 3H]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lengths import spread_lengths
from bench.ops import EXPONENTIAL, HEADS, HIDDEN, Cost, Gemm, Op, Setting
from bench.ops.problem import Draw, Layout, Problem
from hbert_kernels import attention

PRODUCTS = {"fwd": 2, "bwd": 5}  # of n x n x d for each head: S, O; S again, dP, dV, dQ, dK
_SOFTMAX = {"fwd": 3 + EXPONENTIAL, "bwd": 4 + EXPONENTIAL}  # operations for each score


def lengths(setting: Setting) -> list[int]:
    """Of each sequence: all full, or ("varlen") spread."""
    if setting.variant != "varlen":
        return [setting.seq] * setting.batch
    return spread_lengths(setting.batch, setting.seq)


def _cost(setting: Setting) -> Cost:
    """The floor is a packed product with the rows of the projection and as many operations as the products have."""
    sizes = lengths(setting)
    tokens, squares = sum(sizes), sum(n * n for n in sizes)
    columns = round(PRODUCTS[setting.step] * squares / tokens)
    reads, writes, others = {"fwd": (3, 1, 1), "bwd": (5, 3, 5)}[setting.step]
    values = tokens * HIDDEN
    operations = (2 * PRODUCTS[setting.step] * HIDDEN + _SOFTMAX[setting.step] * HEADS) * squares + others * values
    size = values * setting.itemsize
    return Cost(reads * size, writes * size, operations, Gemm(tokens, HIDDEN, columns))


def _sdpa(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N, 3H] -> [B, N, H]."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, HEADS, -1)).unbind(2))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _problem(setting: Setting) -> Problem:
    sizes, draw = torch.tensor(lengths(setting), device=setting.device), Draw(setting)
    cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()
    valid = torch.arange(setting.seq, device=setting.device) < sizes[:, None]
    mask = None if valid.all() else valid[:, None, None]

    def ours(qkv: Tensor) -> Tensor:
        return attention(qkv, cu_seqlens, setting.seq, HEADS)

    def from_packed(rows: Tensor) -> Tensor:
        return rows.new_zeros(*valid.shape, rows.shape[1]).masked_scatter(valid[..., None], rows)

    return Problem(
        (draw.normal(int(cu_seqlens[-1]), 3 * HIDDEN),),
        (),
        {"hbert": ours},
        {"sdpa": lambda qkv: _sdpa(qkv, mask)},
        {"sdpa": Layout(from_packed, lambda padded: padded[valid])},
    )


OP = Op(
    "attention",
    _cost,
    _problem,
    variants={"full": ((8, 128), (1, 512), (1, 2048)), "varlen": ((8, 512),)},
    baselines=("sdpa",),
    memory=("full", "varlen"),
)
