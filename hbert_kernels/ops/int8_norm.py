"""Rows as int8 numbers for :func:`int8_linear`, and the norms that give them in the pass in which they normalize.

Inference only. A row is quantised on its own, symmetrically: with m its largest magnitude,

.. math:: s = m / 127, \\quad q_i = \\mathrm{round}(x_i \\cdot 127 / m), \\quad x_i \\approx s\\,q_i

ties to even, so that q lies in [-127, 127]. A row whose m is below 2^-119 (1.5e-36, zero included) becomes zeros with
scale 0. A row that holds NaN or infinity becomes zeros with scale NaN: all that is computed from it is NaN, and nothing
else is touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check, _dispatch, _library
from ._common import without_autocast, without_gradients
from .activation_layer_norm import CODES, activation_function, activation_layer_norm_reference
from .conv_layer_norm import check_conv_weight, conv_layer_norm_reference
from .layer_norm import layer_norm_reference

_LEAST_MAGNITUDE = 2.0**-119  # 127 over less might be infinite


class Int8Rows(NamedTuple):
    """Rows quantised one by one: row t stands for ``values[t] * scale[t]``.

    Attributes:
        values: int8 [T, H], in [-127, 127].
        scale: float32 [T].
    """

    values: Tensor
    scale: Tensor


def quantize_rows(x: Tensor, *, activation: str | None = None) -> Int8Rows:
    """The rows of x, or of an activation of x, as int8 numbers.

    Args:
        x: packed tokens [T, H], float32 or bfloat16.
        activation: None, "gelu" (with erf), "gelu_tanh" or "relu"; computed in float32.

    Returns:
        The quantised rows; the module's first lines say how rows of zeros, NaN and infinity come out.

    Raises:
        TypeError: unsupported dtype. ValueError: unknown activation, or x is not [T, H].
        RuntimeError: a gradient could be asked for.
    """
    op = "quantize_rows"
    _check.quantizable_rows(op, x)
    if activation is not None:
        activation_function(activation)
    without_gradients(op, x)
    if _dispatch.select(op, x) == "reference":
        return quantize_rows_reference(x, activation)
    code = None if activation is None else CODES[activation]
    return Int8Rows(*torch.ops.hbert_kernels.quantize_rows(x, code))


def layer_norm_int8(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, keep: bool = False
) -> tuple[Int8Rows, Tensor | None]:
    """:func:`layer_norm` with int8 rows as output.

    Args:
        x: packed tokens [T, H], float32 or bfloat16.
        weight, bias, eps: affine parameters [H] or None, and epsilon of the norm.
        keep: return the normalized rows as well, for what reads both.

    Returns:
        ``(rows, y)``: y is [T, H] in x's dtype, or None. The rows are quantised before y is rounded.

    Raises:
        TypeError: unsupported dtype. ValueError: a shape or device does not fit.
        RuntimeError: a gradient could be asked for.
    """
    op = "layer_norm_int8"
    _check.quantizable_rows(op, x, weight=weight, bias=bias)
    without_gradients(op, x, weight, bias)
    if _dispatch.select(op, x, weight, bias) == "reference":
        return _quantized(layer_norm_reference(x.float(), weight, bias, eps), x, keep)
    return _outputs(keep, *torch.ops.hbert_kernels.layer_norm_int8(x, weight, bias, eps, keep))


def add_layer_norm_int8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    keep: bool = False,
) -> tuple[Int8Rows, Tensor | None, Tensor]:
    """:func:`add_layer_norm` with int8 rows as output.

    Args:
        x, residual: packed tokens [T, H], float32 or bfloat16 each.
        weight, bias, eps, keep: as in :func:`layer_norm_int8`.

    Returns:
        ``(rows, y, s)``: s = x + residual in their promoted dtype; rows and y (in x's dtype, or None) are of the norm
        of s as stored.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`layer_norm_int8`; residual has not the shape of x.
    """
    op = "add_layer_norm_int8"
    _check.quantizable_rows(op, x, weight=weight, bias=bias)
    _check.quantizable(op, x=x, residual=residual)
    _check.shape(op, "residual", residual, *x.shape)
    without_gradients(op, x, residual, weight, bias)
    if _dispatch.select(op, x, residual, weight, bias) == "reference":
        # In float32 from the rounded sum on: y is rounded after the rows are quantised.
        total = x + residual
        return *_quantized(layer_norm_reference(total.float(), weight, bias, eps), x, keep), total
    values, scale, y, total = torch.ops.hbert_kernels.add_layer_norm_int8(x, residual, weight, bias, eps, keep)
    return *_outputs(keep, values, scale, y), total


def activation_layer_norm_int8(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "gelu",
    input_bias: Tensor | None = None,
) -> Int8Rows:
    """:func:`activation_layer_norm` with int8 rows as output.

    Args:
        x: packed tokens [T, H], float32 or bfloat16.
        weight, bias, eps, activation, input_bias: as in :func:`activation_layer_norm`.

    Raises:
        TypeError, RuntimeError: as in :func:`layer_norm_int8`.
        ValueError: unknown activation, or a shape or device that does not fit.
    """
    op = "activation_layer_norm_int8"
    activation_function(activation)
    _check.quantizable_rows(op, x, weight=weight, bias=bias, input_bias=input_bias)
    without_gradients(op, x, weight, bias, input_bias)
    if _dispatch.select(op, x, weight, bias, input_bias) == "reference":
        y = activation_layer_norm_reference(x.float(), weight, bias, eps, activation, input_bias)
        return quantize_rows_reference(y)
    arguments = x, weight, bias, eps, CODES[activation], input_bias
    return Int8Rows(*torch.ops.hbert_kernels.activation_layer_norm_int8(*arguments))


def conv_layer_norm_int8(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-5,
    *,
    keep: bool = False,
) -> tuple[Int8Rows, Tensor | None]:
    """:func:`conv_layer_norm` with int8 rows as output.

    Args:
        x: packed tokens [T, H], float32 or bfloat16.
        weight, bias, conv_weight, cu_seqlens, eps: as in :func:`conv_layer_norm`.
        keep: as in :func:`layer_norm_int8`.

    Returns:
        ``(rows, y)`` as :func:`layer_norm_int8`; dead rows are zeros with scale 0.

    Raises:
        TypeError, ValueError: as in :func:`conv_layer_norm`; float64. RuntimeError: a gradient could be asked for.
    """
    op = "conv_layer_norm_int8"
    _check.quantizable_rows(op, x, weight=weight, bias=bias)
    _check.quantizable(op, x=x, conv_weight=conv_weight)
    check_conv_weight(op, conv_weight, x.shape[1])
    _check.cu_seqlens(op, cu_seqlens, x.shape[0], x.device)
    without_gradients(op, x, weight, bias, conv_weight)
    if _dispatch.select(op, x, weight, bias, conv_weight) == "reference":
        return _quantized(conv_layer_norm_reference(x.float(), weight, bias, conv_weight, cu_seqlens, eps), x, keep)
    arguments = x, weight, bias, conv_weight, cu_seqlens, eps, keep
    return _outputs(keep, *torch.ops.hbert_kernels.conv_layer_norm_int8(*arguments))


def _outputs(keep: bool, values: Tensor, scale: Tensor, y: Tensor) -> tuple[Int8Rows, Tensor | None]:
    return Int8Rows(values, scale), y if keep else None


def _quantized(y: Tensor, x: Tensor, keep: bool) -> tuple[Int8Rows, Tensor | None]:
    return quantize_rows_reference(y), y.to(x.dtype) if keep else None


@without_autocast
def quantize_rows_reference(x: Tensor, activation: str | None = None) -> Int8Rows:
    """Plain torch, any device, exportable: the same bits as the kernels, but for the activation's rounding."""
    x = x.float()
    if activation is not None:
        x = activation_function(activation)(x)
    return quantize_by(x, x.abs().amax(1))


def quantize_by(x: Tensor, magnitude: Tensor) -> Int8Rows:
    """Rows x [T, H] in float32 by a magnitude [T] for each of them, not below its largest."""
    quantizable = (magnitude >= _LEAST_MAGNITUDE) & magnitude.isfinite()
    # A tensor divided: torch computes 127 / magnitude as 127 (1 / magnitude), rounded twice.
    inverse = torch.where(quantizable, torch.full_like(magnitude, 127) / magnitude, 0)
    # Where the inverse is 0, x may be NaN or infinite, and then so is the product.
    values = torch.where(quantizable[:, None], (x * inverse[:, None]).round(), 0).to(torch.int8)
    # NaN in the dtype of the magnitude: of two numbers torch would make a tensor of the default dtype.
    not_quantizable = torch.where(magnitude.isfinite(), 0, torch.full_like(magnitude, torch.nan))
    return Int8Rows(values, torch.where(quantizable, magnitude / 127, not_quantizable))


def _rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _quantize_rows_fake(x: Tensor, activation: int | None) -> tuple[Tensor, Tensor]:
    return _rows_fake(x)


def _norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return *_rows_fake(x), x.new_empty(x.shape if keep else (0,))


def _add_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return *_norm_fake(x, weight, bias, eps, keep), total


def _activation_norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int, input_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _rows_fake(x)


def _conv_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_fake(x, weight, bias, eps, keep)


_library.define("quantize_rows(Tensor x, int? activation) -> (Tensor values, Tensor scale)", _quantize_rows_fake)
_library.define(
    "layer_norm_int8(Tensor x, Tensor? weight, Tensor? bias, float eps, bool keep)"
    " -> (Tensor values, Tensor scale, Tensor y)",
    _norm_fake,
)
_library.define(
    "add_layer_norm_int8(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, bool keep)"
    " -> (Tensor values, Tensor scale, Tensor y, Tensor total)",
    _add_norm_fake,
)
_library.define(
    "activation_layer_norm_int8(Tensor x, Tensor? weight, Tensor? bias, float eps, int activation, Tensor? input_bias)"
    " -> (Tensor values, Tensor scale)",
    _activation_norm_fake,
)
_library.define(
    "conv_layer_norm_int8(Tensor x, Tensor? weight, Tensor? bias, Tensor conv_weight, Tensor cu_seqlens, float eps,"
    " bool keep) -> (Tensor values, Tensor scale, Tensor y)",
    _conv_norm_fake,
)
_dispatch.register("quantize_rows", "cpp", _dispatch.cpp_refusal)
_dispatch.register("layer_norm_int8", "cpp", _dispatch.cpp_refusal)
_dispatch.register("add_layer_norm_int8", "cpp", _dispatch.cpp_refusal)
_dispatch.register("activation_layer_norm_int8", "cpp", _dispatch.cpp_refusal)
_dispatch.register("conv_layer_norm_int8", "cpp", _dispatch.cpp_refusal)
