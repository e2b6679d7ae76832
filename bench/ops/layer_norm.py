"""layer_norm and add_layer_norm, 768 wide, against F.layer_norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.ops import HIDDEN, TOKENS, Cost, Op, Setting, tensors
from bench.ops.problem import Draw, Problem
from hbert_kernels import add_layer_norm, layer_norm

_TENSORS = {  # variant, step: read, written, operations a token
    ("plain", "fwd"): (1, 1, 8 * HIDDEN),  # x; y
    ("plain", "bwd"): (2, 1, 16 * HIDDEN),  # dy, x; dx
    ("residual", "fwd"): (2, 2, 9 * HIDDEN),  # x, r; y, s
    ("residual", "bwd"): (3, 1, 17 * HIDDEN),  # dy, ds, s; dx, which is dr too
}


def _cost(setting: Setting) -> Cost:
    return tensors(setting, HIDDEN, *_TENSORS[setting.variant, setting.step])


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,), weight, bias)


def _residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, (HIDDEN,), weight, bias), total


def _problem(setting: Setting) -> Problem:
    draw = Draw(setting)
    if setting.variant == "plain":
        return Problem((draw.rows(),), draw.affine(), {"hbert": layer_norm}, {"eager": _plain})
    return Problem((draw.rows(), draw.rows()), draw.affine(), {"hbert": add_layer_norm}, {"eager": _residual})


OP = Op("layer_norm", _cost, _problem, variants={"plain": TOKENS, "residual": TOKENS})
