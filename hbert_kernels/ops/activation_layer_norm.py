"""Layer normalization of an activation: the norm inside the feed-forward network of sub-layer normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import (
    as_rows,
    cast,
    compute_dtype,
    gradient_like,
    new_statistics,
    present,
    rows_as,
    run,
    without_autocast,
)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# The order is that of the codes in csrc/cpu/row_norm.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def activation_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "gelu",
    input_bias: Tensor | None = None,
) -> Tensor:
    r"""``LN(act(x + input_bias))``: the norm before the second linear of a feed-forward network with sub-layer norm.

    Sub-layer norm places it after the activation (Wang et al. 2022, "Foundation Transformers", arXiv 2210.06423, sec.
    2).

    Args:
        x: [..., H], float32, bfloat16 or float64 (float16 on GPUs).
        weight, bias, eps: affine parameters [H] or None, and epsilon of the norm.
        activation: "gelu" (with erf), "gelu_tanh" (its tanh approximation) or "relu".
        input_bias: [H], added before the activation, or None.

    Returns:
        [..., H] in x's dtype. Activation and statistics are computed in float32 (float64 for float64).

    Raises:
        TypeError: unsupported dtype. ValueError: unknown activation, or a shape or device that does not fit.
    """
    op = "activation_layer_norm"
    activation_function(activation)
    _check.rows(op, x, weight=weight, bias=bias, input_bias=input_bias)
    if _dispatch.select(op, x, weight, bias, input_bias) == "reference":
        return activation_layer_norm_reference(x, weight, bias, eps, activation, input_bias)
    arguments = as_rows(x), weight, bias, eps, CODES[activation], input_bias
    return rows_as(run(_ActivationLayerNorm, torch.ops.hbert_kernels.activation_layer_norm, *arguments), x)


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name; ``ValueError`` that lists the known ones otherwise."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@without_autocast
def activation_layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, input_bias: Tensor | None
) -> Tensor:
    """Plain torch, any device, float64-capable, differentiable, exportable."""
    acc = compute_dtype(x)
    pre = x.to(acc) if input_bias is None else x.to(acc) + input_bias.to(acc)
    activated = activation_function(activation)(pre)
    return F.layer_norm(activated, x.shape[-1:], cast(weight, acc), cast(bias, acc), eps).to(x.dtype)


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int, input_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *new_statistics(x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    input_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gradient_like(x, weight), gradient_like(x, bias), gradient_like(x, input_bias)


_library.define(
    "activation_layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, int activation, Tensor? input_bias)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_library.define(
    "activation_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " int activation, Tensor? input_bias) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinput_bias)",
    _backward_fake,
)
_dispatch.register("activation_layer_norm", "cpp", _dispatch.cpp_refusal)


class _ActivationLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: int,
        input_bias: Tensor | None,
    ) -> Tensor:
        y, mean, rstd = torch.ops.hbert_kernels.activation_layer_norm(x, weight, bias, eps, activation, input_bias)
        ctx.save_for_backward(x, mean, rstd, weight, bias, input_bias)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, input_bias = ctx.saved_tensors
        dx, dweight, dbias, dinput_bias = torch.ops.hbert_kernels.activation_layer_norm_backward(
            dy, x, mean, rstd, weight, bias, ctx.activation, input_bias
        )
        return dx, present(weight, dweight), present(bias, dbias), None, None, present(input_bias, dinput_bias)
