"""gated_layer_norm, 768 wide, against a broadcast product and F.layer_norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.ops import HIDDEN, Cost, Op, Setting, tensors
from bench.ops.problem import Draw, Problem, uniform_cu_seqlens
from hbert_kernels import gated_layer_norm

OPERATIONS = {"fwd": 9 * HIDDEN, "bwd": 20 * HIDDEN}  # a token


def _cost(setting: Setting) -> Cost:
    return tensors(setting, HIDDEN, *{"fwd": (1, 1), "bwd": (2, 1)}[setting.step], OPERATIONS[setting.step])


def _problem(setting: Setting) -> Problem:
    draw, cu_seqlens = Draw(setting), uniform_cu_seqlens(setting)

    def ours(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gated_layer_norm(x, gate, cu_seqlens, weight, bias)

    def eager(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gated = x.view(setting.batch, setting.seq, HIDDEN) * gate[:, None]
        return F.layer_norm(gated, (HIDDEN,), weight, bias).flatten(0, 1)

    activations = draw.rows(), draw.normal(setting.batch, HIDDEN)
    return Problem(activations, draw.affine(), {"hbert": ours}, {"eager": eager})


OP = Op("gated_layer_norm", _cost, _problem)
