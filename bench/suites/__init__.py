"""The suites: what each measures, in which cases, on which peers. No torch here: the coordinator needs none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.corpus import masked_batches
from bench.harness import Case

Shape = tuple[int, int]

HBERTS = ("hbert-v1", "hbert-v2", "hbert-v1c", "hbert-v2c", "hbert-additive", "hbert-additive-c", "hbert-vanilla")
PEERS = ("hf", "hf-compile")
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Metric:
    """A column of figures made from the seconds of a call: a time in `unit`, or a rate (work of the case / seconds)."""

    name: str
    unit: str
    per_second: bool = False
    scale: float = 1.0

    def value(self, seconds: float, work: float) -> float:
        return self.scale * (work / seconds if self.per_second else seconds)


@dataclass(frozen=True)
class Suite:
    """A suite. `module` is imported by the workers and offers task(peer, case); `inputs` makes what all peers share.

    `candidates` are ours, `baselines` are what they are held against; both list everything that can be asked for.
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

    def cases(self, shapes: Sequence[Shape], dtypes: Sequence[str], size: str) -> list[Case]:
        """One case for each dtype and shape, with the models in `size`."""
        return [
            Case(self.name, f"{batch}x{seq}", dtype, batch, seq, work=batch * seq, params={"size": size})
            for dtype in dtypes for batch, seq in shapes
        ]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="latency",
            module="bench.suites.latency",
            metric=Metric("latency", "ms", scale=1e3),
            candidates=HBERTS, baselines=PEERS,
            default_candidates=("hbert-v1", "hbert-v2"), default_baselines=("hf",),
            default_shapes=((1, 128), (8, 128), (1, 512)), quick_shapes=((1, 128),),
            default_dtypes=DTYPES,
        ),
        Suite(
            name="throughput",
            module="bench.suites.throughput",
            metric=Metric("throughput", "tokens/s", per_second=True),
            candidates=HBERTS, baselines=PEERS,
            default_candidates=("hbert-v1", "hbert-v2"), default_baselines=("hf",),
            default_shapes=((8, 128),), quick_shapes=((4, 128),),
            default_dtypes=("bf16",),
            inputs=masked_batches,
        ),
    )
}
