"""What the ops share: how they are called, the compute dtype, autocast policy, and packed <-> padded views."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .._check import has_values

P = ParamSpec("P")
R = TypeVar("R")


def _has_derivative(arguments: tuple[Any, ...]) -> bool:
    """Whether a derivative of a call on these arguments can be asked for, in whatever mode of differentiation.

    Under forward mode and functional transforms the tensors do not tell.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def _distinct(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments; a tensor that was given before as a view of itself."""
    distinct: list[Any] = []
    for argument in arguments:
        repeated = isinstance(argument, Tensor) and any(argument is other for other in distinct)
        distinct.append(argument.view_as(argument) if repeated else argument)
    return distinct


def run(function: type[torch.autograd.Function], op: Callable[..., Any], *arguments: Any, outputs: int = 1) -> Any:
    """``function.apply(*arguments)``, whose forward pass is ``op(*arguments)`` cut to the first ``outputs`` results.

    Where no derivative can be asked for, the op alone: autograd's own bookkeeping costs more than a kernel on few rows.
    """
    if _has_derivative(arguments):
        # torch.compile has no graph for a function that is given one tensor twice.
        return function.apply(*(_distinct(arguments) if torch.compiler.is_compiling() else arguments))
    results = op(*arguments)
    return results[0] if outputs == 1 else results[:outputs]


def without_gradients(op: str, *arguments: Any) -> None:
    """``RuntimeError`` where a derivative of a call on these arguments can be asked for."""
    if _has_derivative(arguments):
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad() or torch.inference_mode()")


def as_rows(x: Tensor) -> Tensor:
    """[..., H] -> [rows, H]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def rows_as(rows: Tensor, x: Tensor) -> Tensor:
    """[rows, H] -> the shape of x: the inverse of :func:`as_rows`."""
    return rows if x.dim() == 2 else rows.view(x.shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and softmax: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``t`` in ``dtype``; None stays None."""
    return t if t is None or t.dtype == dtype else t.to(dtype)


def new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Fake mean and rstd of the rows of x."""
    mean = x.new_empty(x.shape[0], dtype=compute_dtype(x))
    return mean, torch.empty_like(mean)


def gradient_like(x: Tensor, parameter: Tensor | None) -> Tensor:
    """Fake gradient of a parameter; an empty tensor for none, so that ops have a fixed number of outputs."""
    return x.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)


def present(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    """The gradient that autograd expects: None for a parameter that was not given."""
    return None if parameter is None else gradient


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a reference with autocast off: each op states its own precision, so autocast must not change it again."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        if device_type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast(device_type if device_type != "meta" else "cpu", enabled=False):
            return function(*args, **kwargs)

    return wrapper


def to_panels(weight: Tensor, panel: int, group: int, steps: int) -> Tensor:
    """[N, K] -> [panels, steps, panel, group], filled up with zeros: ``weight[panel * p + c, group * s + k]``.

    The number of steps becomes a multiple of ``steps``.
    """
    padded = F.pad(weight, (0, -weight.shape[1] % (group * steps), 0, -weight.shape[0] % panel))
    return padded.unflatten(0, (-1, panel)).unflatten(2, (-1, group)).transpose(1, 2).contiguous()


def from_panels(data: Tensor, columns: int, width: int) -> Tensor:
    """The inverse of :func:`to_panels`: [N, K]."""
    return data.transpose(1, 2).flatten(0, 1).flatten(1)[:columns, :width]


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The sequence of each packed token, int64 [T]; B for dead rows."""
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def alive_rows(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which of the packed rows belong to a sequence: bool [T, 1]."""
    return (torch.arange(rows.shape[0], device=rows.device) < cu_seqlens[-1])[:, None]


def rows_of_sequences(per_sequence: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Row ``per_sequence[b]`` for every token of sequence b, zeros for dead rows: [B, ...] -> [T, ...]."""
    dead = per_sequence.new_zeros(1, *per_sequence.shape[1:])
    return torch.cat([per_sequence, dead])[segment_ids(cu_seqlens, num_tokens)]


def _is_uniform(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> bool:
    """Whether every sequence has exactly ``max_seqlen`` tokens and none is dead: then padding is a view."""
    if not cu_seqlens.is_cpu or num_tokens == 0 or not has_values(cu_seqlens):
        return False
    full = (cu_seqlens.shape[0] - 1) * max_seqlen == num_tokens
    return full and cu_seqlens.tolist() == list(range(0, num_tokens + 1, max_seqlen))


def to_padded(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor | None]:
    """Packed [T, ...] -> padded [B, N, ...] and the mask [B, N] of real tokens (None: all are real).

    Padding is zero whatever the dead rows hold, NaN included.
    """
    num_seqs, num_tokens = cu_seqlens.shape[0] - 1, x.shape[0]
    if _is_uniform(cu_seqlens, num_tokens, max_seqlen):
        return x.unflatten(0, (num_seqs, max_seqlen)), None
    rows = cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=x.device, dtype=cu_seqlens.dtype)
    valid = rows < cu_seqlens[1:, None]
    # One zero row behind the tokens: the target of all padding, so that T = 0 needs no branch.
    source = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return source[torch.where(valid, rows, num_tokens)], valid


def from_padded(padded: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Padded [B, N, ...] -> packed [T, ...] with zeros in the dead rows: the inverse of :func:`to_padded`."""
    num_seqs, max_seqlen = padded.shape[:2]
    if _is_uniform(cu_seqlens, num_tokens, max_seqlen):
        return padded.flatten(0, 1)
    segment = segment_ids(cu_seqlens, num_tokens)
    start = torch.cat([cu_seqlens[:-1], cu_seqlens.new_zeros(1)])[segment]
    row = segment * max_seqlen + torch.arange(num_tokens, device=padded.device) - start
    flat = padded.reshape(num_seqs * max_seqlen, *padded.shape[2:])
    source = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
    return source[torch.where(segment < num_seqs, row, num_seqs * max_seqlen)]
