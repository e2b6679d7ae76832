"""activation_layer_norm, 3072 wide, gelu, against F.gelu and F.layer_norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.ops import EXPONENTIAL, FFN, Cost, Op, Setting, tensors
from bench.ops.problem import Draw, Problem
from hbert_kernels import activation_layer_norm

_OPERATIONS = {"fwd": 9 + 26, "bwd": 19 + 31 + EXPONENTIAL}  # for each value: the norm's, GELU's (with its slope)


def _cost(setting: Setting) -> Cost:
    reads, writes = {"fwd": (1, 1), "bwd": (2, 1)}[setting.step]
    return tensors(setting, FFN, reads, writes, _OPERATIONS[setting.step] * FFN)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(F.gelu(x), (FFN,), weight, bias)


def _problem(setting: Setting) -> Problem:
    draw = Draw(setting)
    candidates = {"hbert": activation_layer_norm}
    return Problem((draw.rows(FFN),), draw.affine(FFN), candidates, {"eager": _eager})


OP = Op("activation_layer_norm", _cost, _problem)
