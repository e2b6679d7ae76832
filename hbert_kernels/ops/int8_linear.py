"""A linear layer of int8 numbers for inference: weights quantised once, rows one by one while the model runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, _dispatch, _library
from ._common import from_panels, to_panels, without_autocast, without_gradients
from .int8_norm import Int8Rows, quantize_by

_MAX_FEATURES = 1 << 17  # sums of more products of int8 numbers may leave 32 bits


class PackedInt8Weight(NamedTuple):
    """A weight [N, K] as :func:`int8_linear` reads it, made by :func:`pack_int8_weight`.

    Laid out for the instruction set level of this process: not to be saved.

    Attributes:
        data: int8 [panels, steps, columns of a panel, group]: the number of column ``panel * columns + c`` and input
            ``step * group + g``; zero beyond N and K.
        start: int32 [panels, columns of a panel], what the sums start from.
        scale: float32 [N].
        in_features: K.
    """

    data: Tensor
    start: Tensor
    scale: Tensor
    in_features: int


def pack_int8_weight(weight: Tensor) -> PackedInt8Weight:
    """Quantises a weight for :func:`int8_linear`, each output channel symmetrically by its largest magnitude.

    Args:
        weight: [N, K], float32 or bfloat16; row n becomes ``round(weight[n] / scale[n])`` in [-127, 127] with
            ``scale[n] = max |weight[n]| / 127``. Where the CPU's product of int8 numbers sums pairs in 16 bits (AVX2,
            and AVX-512 without VNNI), the maximum is taken over the sums of equal signs in each pair of neighbours
            ``weight[n, 2k], weight[n, 2k + 1]``, too, so that none saturates: up to twice as coarse, for weights
            with a normal distribution 1.3 times.

    Raises:
        TypeError: unsupported dtype.
        ValueError: it is not [N, K] with N, K > 0, K exceeds 131,072, or a value is not finite.
    """
    op = "pack_int8_weight"
    _check.quantizable(op, weight=weight)
    if weight.dim() != 2 or 0 in weight.shape or weight.shape[1] > _MAX_FEATURES:
        found = tuple(weight.shape)
        raise ValueError(f"{op}: weight must be [N, K] with N > 0 and 0 < K <= {_MAX_FEATURES}, got shape {found}")
    width = weight.shape[1]
    panel, group, steps, offset, bounded_pairs = _library.int8_weight_layout()
    values, scale = _quantized(weight.detach().float(), bounded_pairs)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{op}: weight holds NaN or infinity")
    data = to_panels(values, panel, group, steps)
    # Rows that are read with 128 added bring 128 times the sum of the weights with them.
    start = data.sum((1, 3), dtype=torch.int32) * (-128 if offset else 0)
    return PackedInt8Weight(data, start, scale, width)


def _quantized(weight: Tensor, bounded_pairs: bool) -> Int8Rows:
    magnitude = weight.abs().amax(1)
    if bounded_pairs:
        pairs = F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
        # Two numbers whose sum is 127 are rounded to 128 at most: times 255, that fits 16 bits.
        for sign in (1, -1):
            magnitude = torch.maximum(magnitude, (sign * pairs).clamp(min=0).sum(2).amax(1))
    return quantize_by(weight, magnitude)


def int8_linear(
    x: Int8Rows,
    weight: PackedInt8Weight,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Linear layer of int8 rows and an int8 weight, plus a residual.

    .. math:: y_{tn} = s_t\,r_n \sum_k q_{tk} w_{nk} + b_n + o_{tn}

    with q, s the rows and their scales, w, r the weight and its scales. The sum is exact at every instruction set
    level; the epilogue is computed in float32. A row's result does not depend on its neighbours or on the threads.

    Args:
        x: int8 values [T, K] and scale [T], from :func:`quantize_rows` or one of the norms.
        weight: from :func:`pack_int8_weight`, of this process.
        bias: [N] or None, float32 or bfloat16.
        other: [T, N] or None, added, float32 or bfloat16.
        out_dtype: float32 or bfloat16.

    Returns:
        [T, N] in out_dtype.

    Raises:
        TypeError: a dtype that is not supported, or x or weight is of another kind.
        ValueError: a shape or device does not fit.
        RuntimeError: a gradient could be asked for, or the weight was packed at another instruction set level.
    """
    op = "int8_linear"
    _check_operands(op, x, weight)
    columns = weight.scale.shape[0]
    _check.quantizable(op, scale=x.scale, bias=bias, other=other)
    if bias is not None:
        _check.shape(op, "bias", bias, columns)
    if other is not None:
        _check.shape(op, "other", other, x.values.shape[0], columns)
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{op}: out_dtype must be torch.float32 or torch.bfloat16, got {out_dtype}")
    without_gradients(op, bias, other)
    if _dispatch.select(op, x.values, bias, other) == "reference":
        return int8_linear_reference(x, weight, bias, other, out_dtype)
    return torch.ops.hbert_kernels.int8_linear(
        x.values, x.scale, weight.data, weight.start, weight.scale, bias, other, out_dtype
    )


def _check_operands(op: str, x: Int8Rows, weight: PackedInt8Weight) -> None:
    if not isinstance(x, Int8Rows):
        raise TypeError(f"{op}: x must be Int8Rows, as quantize_rows gives them, got {type(x).__name__}")
    if not isinstance(weight, PackedInt8Weight):
        raise TypeError(f"{op}: weight must be from pack_int8_weight, got {type(weight).__name__}")
    _check.int8_rows(op, x.values, x.scale)
    if x.values.shape[1] != weight.in_features:
        raise ValueError(f"{op}: x has {x.values.shape[1]} features, the weight takes {weight.in_features}")
    if not (weight.data.is_cpu and x.values.is_cpu) and weight.data.device != x.values.device:
        raise ValueError(f"{op}: weight is on {weight.data.device}, but x is on {x.values.device}")


@without_autocast
def _product(values: Tensor, weight: Tensor) -> Tensor:
    # Exact: every partial sum is an integer below 2^31.
    return (values.double() @ weight.double().t()).float()


def int8_linear_reference(
    x: Int8Rows, weight: PackedInt8Weight, bias: Tensor | None, other: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Plain torch, any device with float64, exportable."""
    y = _product(x.values, unpack_int8_weight(weight)) * x.scale[:, None] * weight.scale
    if bias is not None:
        y = y + bias.float()
    if other is not None:
        y = y + other.float()
    return y.to(out_dtype)


def unpack_int8_weight(weight: PackedInt8Weight) -> Tensor:
    """The int8 numbers [N, K] of a packed weight."""
    return from_panels(weight.data, weight.scale.shape[0], weight.in_features)


def _fake(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_start: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight_scale.shape[0]), dtype=out_dtype)


_library.define(
    "int8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_start, Tensor weight_scale, Tensor? bias,"
    " Tensor? other, ScalarType out_dtype) -> Tensor",
    _fake,
)
_dispatch.register("int8_linear", "cpp", _dispatch.cpp_refusal)
