"""int8_linear with its rows quantised in the call, against F.linear and oneDNN's int8 linear layer.

oneDNN's has one scale for all rows, known beforehand, so that it need not look for the largest value of each, and gets
the rows as the unsigned numbers that it multiplies, so that only their cast is left of its quantisation. It has weights
of 7 bits: of 8, it saturates sums of two products where the CPU has no VNNI. All numbers here are quantised without an
error by all peers, so that they compute the same function. In float64 all are the plain linear layer. The floor is the
product of the setting's dtype with a packed weight: int8 can be below it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops import FFN, HIDDEN, Cost, Gemm, Op, Setting
from bench.ops.problem import Draw, Function, Layout, Problem
from hbert_kernels import int8_linear, pack_int8_weight, quantize_rows

_WIDTHS = {"square": (HIDDEN, HIDDEN), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN)}  # inputs, outputs
_SHAPES = ((1, 16), (1, 128), (8, 128))
_ROW_MAX, _WEIGHT_MAX = 127, 63  # the largest numbers of oneDNN's rows and weights
_SHIFT = 128  # makes rows unsigned: signed ones would have no fast kernel of oneDNN's with VNNI
_QUANTIZE = 4  # operations for each value of a row


def _cost(setting: Setting) -> Cost:
    """Rows and results in the setting's dtype, a byte a weight."""
    width, columns = _WIDTHS[setting.variant]
    rows, results = (setting.tokens * n * setting.itemsize for n in (width, columns))
    product = Gemm(setting.tokens, width, columns)
    return Cost(rows + width * columns, results, product.flops + _QUANTIZE * setting.tokens * width, product)


def _plain_in_float64(function: Function, shift: int = 0) -> Function:
    """`shift`: what has been added to the rows that the function gets."""

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, ...]:
        return F.linear(x - shift, weight, bias) if x.dtype == torch.float64 else function(x, weight, bias)

    return op


def _ours(weight: Tensor) -> Function:
    packed = pack_int8_weight(weight)

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return int8_linear(quantize_rows(x), packed, bias, out_dtype=x.dtype)

    return op


def _onednn(setting: Setting, weight: Tensor) -> Function:
    columns, width = weight.shape
    scale = weight.float().abs().amax(1) / _WEIGHT_MAX
    numbers = (weight.float() / scale[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(numbers, [setting.tokens, width])
    zeros = torch.zeros(columns, dtype=torch.int32)

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            x.to(torch.uint8), 1.0, _SHIFT, packed, scale, zeros, bias.float(), 1.0, 0, x.dtype, "none", [], ""
        )

    return op


def _problem(setting: Setting) -> Problem:
    draw, (width, columns) = Draw(setting), _WIDTHS[setting.variant]
    rows = (draw.normal(setting.tokens, width, scale=_ROW_MAX / 4)).round().clamp(-_ROW_MAX, _ROW_MAX)
    rows[:, 0] = _ROW_MAX
    # What any number of bits holds: 0 and 1, 0 and -1 beside them, so that no scale has to make room for sums of two.
    weight, bias = draw.normal(columns, width).round().abs().clamp(max=1), draw.normal(columns)
    weight[:, 1::2].neg_()
    ours, onednn = _plain_in_float64(_ours(weight)), _plain_in_float64(_onednn(setting, weight), _SHIFT)
    shifted = Layout(from_packed=lambda x: x + _SHIFT, to_packed=lambda results: results)
    return Problem((rows,), (weight, bias), {"hbert": ours}, {"eager": F.linear, "onednn": onednn}, {"onednn": shifted})


OP = Op(
    "int8_linear",
    _cost,
    _problem,
    variants=dict.fromkeys(_WIDTHS, _SHAPES),
    steps=("fwd",),
    baselines=("eager", "onednn"),
)
