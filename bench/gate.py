"""The equality gate of the kernels suite: how wrong a function of a problem is, and how wrong it may be."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.harness import Gate
from bench.ops.problem import Function, Layout, Problem
from bench.runtime import WIDER
from hbert_kernels import use_backend
from hbert_kernels._accuracy import error_bound, evaluate, max_error

# Between two formulas of the same function in a wide dtype; far above its rounding, far below any mistake.
_SAME = 1e-3

Values = dict[str, Tensor]


def in_packed(function: Function, layout: Layout | None) -> Function:
    """`function` with packed activations and results, whatever layout the peer has."""
    if layout is None:
        return function

    def packed(x: Tensor, *parameters: Tensor) -> Tensor:
        output = function(layout.from_packed(x), *parameters)
        assert isinstance(output, Tensor)
        return layout.to_packed(output)

    return packed


def _outputs(function: Function, inputs: Sequence[Tensor]) -> Values:
    with torch.inference_mode():
        made = function(*inputs)
    made = (made,) if isinstance(made, Tensor) else made
    return {f"output {i}": value for i, value in enumerate(made)}


class Checker:
    """Holds functions of one problem against the reference in the wider dtype (fp64 for fp32, fp32 for bf16).

    A function's gate is that of the output or gradient that comes closest to its bound, or is beyond it by most.

    A candidate may be twice as wrong as its own reference in plain torch at the same dtypes, plus 2 ulp
    (hbert_kernels' policy). A baseline may be four times as wrong as the first one, and has to be the same function:
    what torch.compile and oneDNN make of long sums is beyond twice.
    """

    def __init__(self, problem: Problem, backward: bool) -> None:
        self._problem = problem
        self._evaluate = evaluate if backward else _outputs
        self._wider = WIDER[problem.activations[0].dtype]
        self._reference = next(iter(problem.candidates.values()))
        name, plain = next(iter(problem.baselines.items()))
        self._plain = in_packed(plain, problem.layouts.get(name))

    def candidate(self, function: Function) -> Gate:
        """The gate of an implementation of ours."""
        return self._worst(function, self._reference_errors)

    def baseline(self, function: Function) -> Gate:
        """The gate of one that ours are compared with."""
        wide = self._evaluate(self._plain, self._wide_inputs)
        worst = max(max_error(wide[name], exact) / _size(exact) for name, exact in self._exact.items())
        if not worst <= _SAME:
            return Gate(worst, _SAME)
        return self._worst(function, {name: 2 * error for name, error in self._plain_errors.items()})

    @property
    def _wide_inputs(self) -> list[Tensor]:
        return [value.to(self._wider) for value in self._problem.inputs]

    @functools.cached_property
    def _exact(self) -> Values:
        with use_backend("reference"):
            values = self._evaluate(self._reference, self._wide_inputs)
        return {name: value.double() for name, value in values.items()}

    @functools.cached_property
    def _reference_errors(self) -> dict[str, float]:
        with use_backend("reference"):
            return self._errors(self._reference)

    @functools.cached_property
    def _plain_errors(self) -> dict[str, float]:
        return self._errors(self._plain)

    def _errors(self, function: Function) -> dict[str, float]:
        values = self._evaluate(function, self._problem.inputs)
        return {name: max_error(values[name], exact) for name, exact in self._exact.items()}

    def _worst(self, function: Function, plain: dict[str, float]) -> Gate:
        gates = [Gate(error, self._bound(name, plain[name])) for name, error in self._errors(function).items()]
        return max(gates, key=lambda gate: gate.error / gate.allowed if gate.passed else float("inf"))

    def _bound(self, name: str, plain_error: float) -> float:
        kind, _, index = name.partition(" ")
        problem = self._problem
        summed = kind == "gradient" and int(index) >= len(problem.activations)
        dtype = problem.inputs[int(index)].dtype if kind == "gradient" else problem.activations[0].dtype
        return error_bound(self._exact[name], plain_error, dtype, problem.activations[0].shape[0] if summed else 1)


def _size(exact: Tensor) -> float:
    return float(exact.abs().max()) or 1.0
