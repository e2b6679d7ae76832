"""The processor as the device of a worker."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench import memory

if TYPE_CHECKING:
    import torch

Step = Callable[[], object]


class Cpu:
    """The processor: wall clock, and memory as the kernel counts it. Works in a process without torch."""

    name = "cpu"
    flushes = has_graphs = False
    untimed = 1  # the other peers have just used the caches, and the threads sleep
    isa = None

    @functools.cached_property
    def place(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def describe(self) -> dict[str, str]:
        return {"device": "cpu"}

    def warm_up(self, step: Step) -> None:
        for _ in range(self.untimed):
            step()

    def time(self, step: Step, group: int, samples: int, flush: bool = False) -> list[float]:
        assert not flush, "on a CPU buffers take turns"
        return [self._seconds(step, group) for _ in range(samples)]

    @staticmethod
    def _seconds(step: Step, group: int) -> float:
        start = time.perf_counter()
        for _ in range(group):
            step()
        return (time.perf_counter() - start) / group

    def captured(self, step: Step) -> tuple[Step, str]:
        raise NotImplementedError("a CPU has no graphs")

    def held(self) -> int:
        return memory.held()

    def peak(self, call: Step) -> int:
        return memory.peak(call)
