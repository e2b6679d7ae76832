"""A linear layer for inference whose weight is laid out once for the kernel that reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, _dispatch, _library
from ._common import cast, from_panels, to_panels, without_autocast, without_gradients
from .activation_layer_norm import CODES, activation_function


class PackedWeight(NamedTuple):
    """A weight [N, K] as :func:`packed_linear` reads it, made by :func:`pack_weight`.

    Laid out for the instruction set level of this process: not to be saved.

    Attributes:
        data: [panels, steps, columns of a panel, inputs of a step], float32 or bfloat16: input ``step * inputs + k``
            of column ``panel * columns + c``; zero beyond N and K.
        out_features: N.
        in_features: K.
    """

    data: Tensor
    out_features: int
    in_features: int


def pack_weight(weight: Tensor) -> PackedWeight:
    """Lays out a weight for :func:`packed_linear`.

    Args:
        weight: float32 or bfloat16 [N, K].

    Raises:
        TypeError: it is of another dtype, or no tensor.
        ValueError: it is not [N, K] with N, K > 0.
    """
    op = "pack_weight"
    _check.quantizable(op, weight=weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be [N, K] with N, K > 0, got shape {tuple(weight.shape)}")
    columns, width = weight.shape
    panel, group, steps = _library.packed_weight_layout(weight.dtype == torch.bfloat16)
    return PackedWeight(to_panels(weight.detach(), panel, group, steps), columns, width)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    r"""Linear layer of rows and a packed weight, its activation, and a residual.

    .. math:: y_{tn} = \mathrm{act}\Big(\sum_k x_{tk} w_{nk} + b_n\Big) + o_{tn}

    Sums, bias, activation and residual are computed in float32. A row's result does not depend on its neighbours or on
    the number of threads.

    Args:
        x: [T, K], float32 or bfloat16.
        weight: from :func:`pack_weight`, of this process and in x's dtype.
        bias: [N] or None, float32 or bfloat16.
        other: [T, N] or None, added behind the activation, in x's dtype.
        activation: None, "gelu" (with erf), "gelu_tanh" or "relu".

    Returns:
        [T, N] in x's dtype.

    Raises:
        TypeError: a dtype that is not supported, or weight is of another kind.
        ValueError: a shape or device does not fit, or an unknown activation.
        RuntimeError: a gradient could be asked for, or the weight was packed at another instruction set level.
    """
    op = "packed_linear"
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"{op}: weight must be from pack_weight, got {type(weight).__name__}")
    _check.quantizable(op, x=x, weight=weight.data, bias=bias, other=other)
    _check.same_dtype(op, x=x, weight=weight.data, other=other)
    _check.packed(op, "x", x)
    if x.shape[1] != weight.in_features:
        raise ValueError(f"{op}: x has {x.shape[1]} features, the weight takes {weight.in_features}")
    _check.shape(op, "bias", bias, weight.out_features)
    _check.shape(op, "other", other, x.shape[0], weight.out_features)
    if activation is not None:
        activation_function(activation)
    without_gradients(op, x, bias, other)
    if _dispatch.select(op, x, bias, other) == "reference":
        return packed_linear_reference(x, weight, bias, other, activation)
    code = None if activation is None else CODES[activation]
    columns = weight.out_features
    return torch.ops.hbert_kernels.packed_linear(x, weight.data, columns, cast(bias, torch.float32), other, code)


@without_autocast
def packed_linear_reference(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, other: Tensor | None, activation: str | None
) -> Tensor:
    """Plain torch, any device, exportable."""
    y = F.linear(x.float(), unpack_weight(weight).float(), cast(bias, torch.float32))
    if activation is not None:
        y = activation_function(activation)(y)
    return (y if other is None else y + other).to(x.dtype)


def unpack_weight(weight: PackedWeight) -> Tensor:
    """The numbers [N, K] of a packed weight."""
    return from_panels(weight.data, weight.out_features, weight.in_features)


def _fake(
    x: Tensor, weight: Tensor, columns: int, bias: Tensor | None, other: Tensor | None, activation: int | None
) -> Tensor:
    return x.new_empty((x.shape[0], columns))


_library.define(
    "packed_linear(Tensor x, Tensor weight, int columns, Tensor? bias, Tensor? other, int? activation) -> Tensor", _fake
)
_dispatch.register("packed_linear", "cpp", _dispatch.cpp_refusal)
