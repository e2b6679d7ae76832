"""How well the Triton kernels would fill a GPU, modelled from what they are compiled to.

``python tests/gpu/gpu_model.py`` prints the table of docs/gpu-model.md. Nothing in it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import aot_compile as aot
import torch

from hbert_kernels.triton import additive_pool, conv_layer_norm, row_norm

_NORMS = "layer_norm", "add_layer_norm", "layer_norm_backward", "activation_layer_norm", "gated_layer_norm"
OPS: dict[ModuleType, tuple[str, ...]] = {
    row_norm: (*_NORMS, "activation_layer_norm_backward", "gated_layer_norm_backward"),
    conv_layer_norm: ("conv_layer_norm", "conv_layer_norm_backward"),
    additive_pool: ("additive_pool", "additive_pool_backward"),
}
WARP = 32
REGISTER_UNIT = 256  # of a warp's allocation
PARTITIONS = 4  # of a multiprocessor; a warp has its registers in one
RESERVED_SHARED = 1024  # of every block, by the driver


@dataclass(frozen=True)
class Gpu:
    """Data sheet values, per multiprocessor where nothing else is said."""

    name: str
    architecture: str
    multiprocessors: int
    gigabytes_per_second: int
    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32

    def resident(self, registers: int, warps: int, shared: int) -> int:
        """Blocks that a multiprocessor has at a time."""
        of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = self.registers // PARTITIONS // of_warp * PARTITIONS // warps
        return min(self.blocks, self.warps // warps, by_registers, self.shared // (shared + RESERVED_SHARED))

    def microseconds(self, nbytes: int) -> float:
        """The least time to move so many bytes."""
        return nbytes / self.gigabytes_per_second / 1e3


A100 = Gpu("A100", "sm_80", 108, 2039, 164 << 10)
H100 = Gpu("H100", "sm_90", 132, 3350, 228 << 10)
GPUS = A100, H100
SHAPES = {"32x128": aot.Shape(768), "8x512": aot.Shape(768, sequences=8)}


@dataclass(frozen=True)
class Call:
    """An op, what it launches, and the bytes of its inputs and outputs."""

    op: str
    launches: list[aot.Launch]
    nbytes: int


def _bytes(values: Any) -> int:
    return sum(t.nbytes for t in values if isinstance(t, torch.Tensor))


def _observed(function: Callable, label: str, launches: list[aot.Launch], calls: list[Call]) -> Callable:
    def call(*arguments: Any) -> Any:
        first = len(launches)
        results = function(*arguments)
        calls.append(Call(function.__name__ + label, launches[first:], _bytes(arguments) + _bytes(results)))
        return results

    return call


def _observe(problem: aot.Problem, label: str) -> list[Call]:
    calls: list[Call] = []
    with ExitStack() as stack:
        launches = stack.enter_context(aot.recording(A100.architecture))
        for module, names in OPS.items():
            for name in names:
                observed = _observed(getattr(module, name), label, launches, calls)
                stack.enter_context(mock.patch.object(module, name, observed))
        problem()
    return calls


def calls_of(shape: aot.Shape) -> list[Call]:
    """The ops of an additive layer and of its feed-forward network, forward and backward."""
    inner = replace(shape, width=4 * shape.width)
    problems: list[tuple[aot.Problem, str]] = [
        (lambda: aot.add_layer_norm(shape), ""),
        (lambda: aot.conv_norm(shape), ""),
        (lambda: aot.activation_layer_norm(inner), f" ({inner.width} wide)"),
        (lambda: aot.gated_layer_norm(shape), ""),
        (lambda: aot.pool(shape), " (one scorer)"),
        (lambda: aot.pool(shape, "own", full=True), " (own scorers, whole rows)"),
    ]
    return [call for problem, label in problems for call in _observe(problem, label)]


@dataclass(frozen=True)
class Fill:
    """How a launch, its arguments aligned, fills a GPU."""

    registers: int
    shared: int
    resident: int
    occupancy: float
    waves: float


def fill(launch: aot.Launch, gpu: Gpu) -> Fill:
    """Compile the launch for the GPU."""
    used = aot.resources(aot.specialize(launch, gpu.architecture, aligned=True))
    warps = launch.options["num_warps"]
    resident = gpu.resident(used["registers"], warps, used["shared"])
    waves = math.prod(launch.grid) / (resident * gpu.multiprocessors)
    return Fill(used["registers"], used["shared"], resident, resident * warps / gpu.warps, waves)


def _both(texts: Iterable[str]) -> str:
    """A text for each GPU as one."""
    return " / ".join(dict.fromkeys(texts))


def _compiled(fills: list[Fill]) -> list[str]:
    return [
        _both(str(f.registers) for f in fills),
        _both(f"{f.shared / 1024:.0f}" for f in fills),
        _both(f"{f.resident} ({f.occupancy:.0%})" for f in fills),
    ]


def rows() -> Iterator[list[str]]:
    """Of the table: a launch each. The first one of an op has the op's time."""
    by_shape = [calls_of(shape) for shape in SHAPES.values()]
    for calls in zip(*by_shape, strict=True):
        op = [calls[0].op, *(_both(f"{gpu.microseconds(c.nbytes):.1f}" for gpu in GPUS) for c in calls)]
        for launches in zip(*(c.launches for c in calls), strict=True):
            fills = [[fill(launch, gpu) for gpu in GPUS] for launch in launches]
            first = launches[0]
            cells = [first.kernel.__name__, str(first.options["num_warps"]), *_compiled(fills[0])]
            for launch, of_launch in zip(launches, fills, strict=True):
                cells += [str(math.prod(launch.grid)), _both(f"{f.waves:.1f}" for f in of_launch)]
            yield [*op, *cells]
            op = [""] * len(op)


def main() -> None:
    header = ["op", *(f"us, {shape}" for shape in SHAPES)]
    header += ["launch", "warps", "registers", "shared KiB", "resident"]
    header += [f"{what}, {shape}" for shape in SHAPES for what in ("programs", "waves")]
    for line in (header, ["---"] * len(header), *rows()):
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
