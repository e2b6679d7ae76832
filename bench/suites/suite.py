"""What a suite is: its metric, its peers, and the cases that a command line asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bench.harness import TIME, Case
from bench.names import fixed_dtype

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
    sizes: tuple[str, ...] = ("base",)
    checkpoint: Path | None = None

    @property
    def models(self) -> dict[str, str]:
        """What is measured, as cases are named and as their workers are told: sizes, or the folder of a checkpoint."""
        if self.checkpoint is not None:
            return {self.checkpoint.name: str(self.checkpoint)}
        return {size: size for size in self.sizes}


@dataclass(frozen=True)
class Shapes:
    """The batch x tokens of a suite for one size of model: its own, and the fewer of --quick.

    Peers that are `only_named` take part at this size where the command line names them, and not by default.
    """

    full: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    only_named: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A suite. `module` is imported by the workers and offers builder(case); `inputs` makes what all peers share.

    `candidates` are ours, `baselines` are what they are held against; both list everything that can be asked for.
    With `one_process` all peers work in one process, else each in its own. `min_time` is the default of --min-time, in
    seconds. `weighs` says what its peak memory is that of. `shapes` are those of each size of model; `default_sizes`
    are measured unless others are asked for, with --quick the first of them.
    """

    name: str
    module: str
    metric: Metric
    candidates: tuple[str, ...]
    baselines: tuple[str, ...]
    default_candidates: tuple[str, ...]
    default_baselines: tuple[str, ...]
    default_dtypes: tuple[str, ...]
    shapes: Mapping[str, Shapes] = field(default_factory=dict)
    default_sizes: tuple[str, ...] = ("base",)
    inputs: Callable[[Case, Path], dict[str, Any]] | None = None

    one_process: ClassVar[bool] = False
    has_ops: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    takes_checkpoint: ClassVar[bool] = False
    max_seq: ClassVar[int] = 512
    min_time: ClassVar[float] = 2.0
    quick_min_time: ClassVar[float] = 0.5
    weighs: ClassVar[str] = "a forward, with the weights and all that the process has kept"

    def cases(self, wanted: Wanted) -> list[Case]:
        """One case for each model, dtype and shape."""
        return [
            Case(
                self.name,
                f"{name}/{batch}x{seq}",
                dtype,
                batch,
                seq,
                self.work(batch, seq),
                self.params(model),
                measures=self.measures(),
            )
            for name, model in wanted.models.items()
            for dtype in wanted.dtypes or self.default_dtypes
            for batch, seq in wanted.shapes or self._shapes_of(model, wanted.quick)
        ]

    @staticmethod
    def named(case: Case, name: str, **params: Any) -> Case:
        """A form of `case` under another name, with more for its workers."""
        return dataclasses.replace(case, name=name, params={**case.params, **params})

    def _shapes_of(self, size: str, quick: bool) -> tuple[Shape, ...]:
        shapes = self.shapes.get(size, self.shapes["base"])
        return shapes.quick if quick else shapes.full

    def by_default(self, peer: str, case: Case) -> bool:
        """Whether a peer has a place in `case` without being named: one of a fixed dtype where that is the case's."""
        return fixed_dtype(peer) in (None, case.dtype)

    def work(self, batch: int, seq: int) -> float:
        """The tokens of a batch."""
        return batch * seq

    def params(self, model: str) -> dict[str, Any]:
        """What a case tells its workers."""
        return {"size": model}

    def measures(self) -> tuple[str, ...]:
        """What is measured of each case."""
        return (TIME,)

    def floor_of(self, peer: str) -> str:
        """The peer that is the least time that `peer` could take; "" where none is known."""
        return ""

    def rate(self, case: Case) -> Metric | None:
        """What `case.work` a second is, where that is not the suite's metric already."""
        return None
