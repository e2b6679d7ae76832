"""conv_layer_norm, 768 wide, 3 taps, against F.layer_norm and torch's depthwise convolution on [B, H, N]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.ops import HIDDEN, Cost, Op, Setting
from bench.ops.problem import Draw, Problem, uniform_cu_seqlens
from hbert_kernels import conv_layer_norm

_TAPS = 3
_NORM = 8  # operations for each value
_CHUNK = 64  # rows


def _cost(setting: Setting) -> Cost:
    """In the forward, rows beside the borders of chunks are normalized twice."""
    reads, each = {"fwd": (1, _NORM + 2 * _TAPS), "bwd": (2, 20 + 4 * _TAPS)}[setting.step]
    borders = setting.batch * (-(-setting.seq // _CHUNK) - 1) if setting.step == "fwd" else 0
    values = setting.tokens * HIDDEN
    size = values * setting.itemsize
    return Cost(reads * size, size, each * values + _NORM * (_TAPS - 1) * borders * HIDDEN)


def _problem(setting: Setting) -> Problem:
    draw, cu_seqlens = Draw(setting), uniform_cu_seqlens(setting)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor) -> Tensor:
        return conv_layer_norm(x, weight, bias, conv_weight, cu_seqlens)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor) -> Tensor:
        normed = F.layer_norm(x, (HIDDEN,), weight, bias).view(setting.batch, setting.seq, HIDDEN)
        taps = conv_weight.t()[:, None]
        mixed = F.conv1d(normed.transpose(1, 2), taps, padding=_TAPS // 2, groups=HIDDEN)
        return (normed + mixed.transpose(1, 2)).flatten(0, 1)

    parameters = *draw.affine(), draw.normal(_TAPS, HIDDEN, scale=0.5)
    return Problem((draw.rows(),), parameters, {"hbert": ours}, {"eager": eager})


OP = Op("conv_layer_norm", _cost, _problem)
