"""What a suite is: its metric, its peers, and the cases that a command line asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.harness import FEWEST, Case, Effort

Shape = tuple[int, int]


@dataclass(frozen=True)
class Metric:
    """A column of figures made from the seconds of a call: a time in `unit`, or a rate (work of the case / seconds)."""

    name: str
    unit: str
    per_second: bool = False
    scale: float = 1.0

    def value(self, seconds: float, work: float) -> float:
        return self.scale * (work / seconds if self.per_second else seconds)


FLOOR_RATIO = Metric("floor_ratio", "x floor")
PEAK_MEMORY = Metric("peak_memory", "MiB", scale=1 / (1 << 20))
BANDWIDTH = Metric("bandwidth", "GB/s", per_second=True, scale=1e-9)
FLOP_RATE = Metric("flop_rate", "GFLOP/s", per_second=True, scale=1e-9)


@dataclass(frozen=True)
class Wanted:
    """What the command line asks of the cases; None: the suite's own."""

    shapes: tuple[Shape, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    ops: tuple[str, ...] | None = None
    quick: bool = False
    size: str = "base"


@dataclass(frozen=True)
class Suite:
    """A suite. `module` is imported by the workers and offers builder(case); `inputs` makes what all peers share.

    `candidates` are ours, `baselines` are what they are held against; both list everything that can be asked for.
    With `one_process` all peers work in one process, else each in its own. `effort` is the default of --min-time.
    """

    name: str
    module: str
    metric: Metric
    candidates: tuple[str, ...]
    baselines: tuple[str, ...]
    default_candidates: tuple[str, ...]
    default_baselines: tuple[str, ...]
    default_shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]
    default_dtypes: tuple[str, ...]
    inputs: Callable[[Case, Path], dict[str, Any]] | None = None

    one_process: ClassVar[bool] = False
    has_ops: ClassVar[bool] = False
    max_seq: ClassVar[int] = 512
    effort: ClassVar[Effort] = Effort(min_time=2.0, min_rounds=5)
    quick_effort: ClassVar[Effort] = Effort(min_time=0.5, min_rounds=FEWEST)

    def cases(self, wanted: Wanted) -> list[Case]:
        """One case for each dtype and shape, with the models in the wanted size."""
        shapes = wanted.shapes or (self.quick_shapes if wanted.quick else self.default_shapes)
        return [
            Case(self.name, f"{batch}x{seq}", dtype, batch, seq, work=batch * seq, params={"size": wanted.size})
            for dtype in wanted.dtypes or self.default_dtypes for batch, seq in shapes
        ]

    def rate(self, case: Case) -> Metric:
        """What `case.work` per second is, for a suite whose cases have a floor."""
        raise NotImplementedError(f"the suite {self.name} has no floor")
