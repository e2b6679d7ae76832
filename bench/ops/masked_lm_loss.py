"""masked_lm_loss, 15% of the tokens, 768 x 30522, against F.linear and F.cross_entropy on the gathered rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops import EXPONENTIAL, HIDDEN, ITEMSIZE, Cost, Gemm, Op, Setting
from bench.ops.problem import Draw, Problem
from hbert_kernels import masked_lm_loss

_VOCAB = 30522
_MASKED = 0.15
_PRODUCTS = {"fwd": 1, "full": 3}  # the logits; the gradients of rows and decoder
_SOFTMAX = {"fwd": 3 + EXPONENTIAL, "full": 6 + EXPONENTIAL}  # operations for each logit


def _rows(setting: Setting) -> int:
    return max(1, round(_MASKED * setting.tokens))


def _cost(setting: Setting) -> Cost:
    rows, products = _rows(setting), _PRODUCTS[setting.step]
    decoder = _VOCAB * HIDDEN * ITEMSIZE["fp32"]
    written = decoder if setting.step == "full" else 0
    reads = rows * HIDDEN * setting.itemsize + decoder
    gemm = Gemm(rows, HIDDEN, _VOCAB, products)
    return Cost(reads, written, gemm.flops + _SOFTMAX[setting.step] * rows * _VOCAB, gemm)


def _problem(setting: Setting) -> Problem:
    """bf16 is what autocast makes of training: bf16 rows, fp32 decoder, which torch casts at each step."""
    draw, rows = Draw(setting), _rows(setting)
    labels = torch.randint(_VOCAB, (rows,), generator=torch.Generator().manual_seed(rows)).to(setting.device)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_lm_loss(hidden, weight, bias, labels)[0]

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
        return F.cross_entropy(logits.to(weight.dtype), labels)

    parameters = draw.normal(_VOCAB, HIDDEN, scale=0.02, dtype="fp32"), draw.normal(_VOCAB, scale=0.02, dtype="fp32")
    return Problem((draw.normal(rows, HIDDEN),), parameters, {"hbert": ours}, {"eager": eager})


OP = Op(
    "masked_lm_loss",
    _cost,
    _problem,
    variants={"": ((8, 512),)},
    steps=("fwd", "full"),
    baselines=("eager",),
    cold=lambda setting: True,
    memory=("",),
)
