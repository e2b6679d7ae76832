"""What a suite builds for one peer and one case."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Task(ABC):
    """One peer at work on one case.

    `flushed`: each call has to find an empty cache, which the device is asked to empty.
    `resident`: its peak memory is the whole process's, of which that before the first model is taken off.
    `capturable`: on a GPU, a short call may be replaced by the replay of its CUDA graph.
    """

    flushed = False
    capturable = False
    resident = False

    @abstractmethod
    def step(self) -> object:
        """One call: what is timed."""

    @abstractmethod
    def check(self) -> tuple[float, float]:
        """(error against the reference of the same weights, largest error allowed)."""

    @abstractmethod
    def traits(self) -> dict[str, str]:
        """`isa` and `backend` that the call uses."""
