"""additive_pool, 12 heads of 64, with dense and per-head scorers, against softmax and a weighted sum."""

from __future__ import annotations

from torch import Tensor

from bench.ops import EXPONENTIAL, HEADS, HIDDEN, TOKENS, Cost, Op, Setting, tensors
from bench.ops.problem import Draw, Problem, uniform_cu_seqlens
from hbert_kernels import additive_pool

HEAD_DIM = HIDDEN // HEADS
SCORER_WIDTH = {"dense": HIDDEN, "per-head": HEAD_DIM}


def pool(rows: Tensor, scorer: Tensor) -> Tensor:
    """The plain torch composition: rows [B, N, H], scorer [h, H] or [h, d] -> [B, H]."""
    slices = rows.unflatten(-1, (HEADS, HEAD_DIM))
    scores = rows @ scorer.t() if scorer.shape[1] == HIDDEN else (slices * scorer).sum(-1)
    alpha = (scores * HEAD_DIM**-0.5).softmax(1)
    return (alpha[..., None] * slices).sum(1).flatten(1)


def pool_operations(step: str, scorer_width: int) -> int:
    """Of one pooling, a token: scores, softmax, weighted sums."""
    scores, softmax, sums = {"fwd": (2, 3, 2), "bwd": (6, 6, 4)}[step]
    return HEADS * (scores * scorer_width + softmax + EXPONENTIAL) + sums * HIDDEN


def _cost(setting: Setting) -> Cost:
    operations = pool_operations(setting.step, SCORER_WIDTH[setting.variant])
    return tensors(setting, HIDDEN, *{"fwd": (1, 0), "bwd": (1, 1)}[setting.step], operations)


def _problem(setting: Setting) -> Problem:
    draw, cu_seqlens = Draw(setting), uniform_cu_seqlens(setting)

    def ours(x: Tensor, scorer: Tensor) -> Tensor:
        return additive_pool(x, scorer, cu_seqlens, setting.seq, HEADS).to(x.dtype)

    def eager(x: Tensor, scorer: Tensor) -> Tensor:
        return pool(x.view(setting.batch, setting.seq, HIDDEN), scorer)

    width = SCORER_WIDTH[setting.variant]
    scorer = draw.normal(HEADS, width, scale=(HEAD_DIM / width) ** 0.5)
    return Problem((draw.rows(),), (scorer,), {"hbert": ours}, {"eager": eager})


OP = Op("additive_pool", _cost, _problem, variants=dict.fromkeys(SCORER_WIDTH, TOKENS))
