"""packed_linear against F.linear (MKL packs the weight at each call) and oneDNN's product with a packed weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops import FFN, HIDDEN, Cost, Gemm, Op, Setting
from bench.ops.problem import Draw, Function, Problem
from hbert_kernels import pack_weight, packed_linear

_WIDTHS = {"square": (HIDDEN, HIDDEN), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN)}  # inputs, outputs
_SHAPES = ((1, 16), (1, 128), (8, 128))


def _cost(setting: Setting) -> Cost:
    width, columns = _WIDTHS[setting.variant]
    rows, results = (setting.tokens * n * setting.itemsize for n in (width, columns))
    product = Gemm(setting.tokens, width, columns)
    return Cost(rows + width * columns * setting.itemsize, results, product.flops, product)


def _only_in(dtype: torch.dtype, function: Function) -> Function:
    """The weight is packed in one dtype: in others, in which the gate computes the truth, the plain linear layer."""

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, ...]:
        return function(x, weight, bias) if x.dtype == dtype else F.linear(x, weight, bias)

    return op


def _ours(weight: Tensor) -> Function:
    packed = pack_weight(weight)
    return lambda x, weight, bias: packed_linear(x, packed, bias)


def _onednn(weight: Tensor) -> Function:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _problem(setting: Setting) -> Problem:
    draw, (width, columns) = Draw(setting), _WIDTHS[setting.variant]
    rows, bias = draw.normal(setting.tokens, width), draw.normal(columns)
    weight = draw.normal(columns, width, scale=width**-0.5)
    ours, onednn = (_only_in(weight.dtype, function) for function in (_ours(weight), _onednn(weight)))
    return Problem((rows,), (weight, bias), {"hbert": ours}, {"eager": F.linear, "onednn": onednn})


OP = Op(
    "packed_linear",
    _cost,
    _problem,
    variants=dict.fromkeys(_WIDTHS, _SHAPES),
    steps=("fwd",),
    baselines=("eager", "onednn"),
)
