"""The numerics policy as code: how wrong a kernel may be.

A kernel's error against float64 is at most twice the error of the same computation in plain torch at the same dtypes,
plus two units in the last place of the largest value; gradients of parameters, sums over rows, may lose sqrt(rows) of
these. There are no tolerances chosen by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import use_backend

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
_FEW_VALUES, _DRAWS = 4096, 4


@dataclass(frozen=True)
class Result:
    """One output or gradient of a kernel against float64: it passes if error <= bound."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.bound


def max_error(value: Tensor, exact: Tensor) -> float:
    """max |value - exact|, 0 for empty tensors, NaN if value has one."""
    return 0.0 if exact.numel() == 0 else float((value.double() - exact).abs().max())


def error_bound(exact: Tensor, plain_error: float, dtype: torch.dtype, summed_rows: int = 1) -> float:
    """The largest error that the policy allows, from the error of plain torch at the kernel's dtypes."""
    if exact.numel() == 0:
        return 0.0
    ulp = torch.finfo(dtype).eps * float(exact.abs().max())
    return 2 * plain_error + 2 * ulp * math.sqrt(summed_rows)


def evaluate(function: Function, inputs: Sequence[Tensor], seed: int = 0) -> dict[str, Tensor]:
    """All outputs of ``function`` and the gradients of all floating inputs under fixed random output gradients.

    Outputs alone, if they have no gradient.
    """
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    values = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if not any(o.requires_grad for o in outputs):
        return values
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    wanted = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.requires_grad]
    gradients = torch.autograd.grad(outputs, [leaf for _, leaf in wanted], cotangents)
    return values | {f"gradient {i}": g for (i, _), g in zip(wanted, gradients, strict=True)}


def _plain_errors(function: Function, inputs: Sequence[Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The error of plain torch at the dtypes of the inputs.

    For float64 there is nothing more exact to measure against. Rounding errors scale with the unit roundoff, so that of
    float32 stands in, doubled because the value taken for exact is itself rounded.
    """
    if inputs[0].dtype != torch.float64:
        return {name: max_error(value, exact[name]) for name, value in evaluate(function, inputs).items()}
    single = evaluate(function, [t.float() if t.is_floating_point() else t for t in inputs])
    scale = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {name: scale * max_error(value, exact[name]) for name, value in single.items()}


def _jittered(inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The floating inputs, each value moved by at most an ulp."""
    generator = torch.Generator().manual_seed(seed)

    def move(t: Tensor) -> Tensor:
        noise = torch.randint(-1, 2, t.shape, generator=generator).to(t.device, torch.float64)
        return (t.double() * (1 + noise * torch.finfo(t.dtype).eps)).to(t.dtype)

    return [move(t) if t.is_floating_point() else t for t in inputs]


def _plain_bounds(function: Function, inputs: Sequence[Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The error of plain torch: on few values a matter of luck, so there the largest over some neighbouring inputs."""
    errors = _plain_errors(function, inputs, exact)
    for seed in range(_DRAWS if inputs[0].numel() < _FEW_VALUES else 0):
        moved = _jittered(inputs, seed)
        truth = evaluate(function, [t.double() if t.is_floating_point() else t for t in moved])
        for name, error in _plain_errors(function, moved, truth).items():
            errors[name] = max(errors[name], error)
    return errors


def compare(function: Function, inputs: Sequence[Tensor], backend: str) -> list[Result]:
    """Outputs and gradients of ``function`` on ``backend`` against the reference in float64, by the policy.

    One-dimensional floating inputs are parameters: their gradients are sums over the rows of the first input.
    """
    with use_backend("reference"):
        exact = evaluate(function, [t.double() if t.is_floating_point() else t for t in inputs])
        plain = _plain_bounds(function, inputs, exact)
    with use_backend(backend):
        actual = evaluate(function, inputs)
    rows = max(1, inputs[0].shape[0])
    results = []
    for name, value in actual.items():
        kind, _, index = name.partition(" ")
        shared = kind == "gradient" and inputs[int(index)].dim() == 1
        bound = error_bound(exact[name], plain[name], value.dtype, rows if shared else 1)
        results.append(Result(name, max_error(value, exact[name]), bound))
    return results
