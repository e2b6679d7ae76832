"""The throughput suite, as the coordinator sees it: each of our models beside the products of its own step."""

from __future__ import annotations

from typing import ClassVar

from bench import machine
from bench.harness import FLOOR, MEMORY, TIME, Case
from bench.suites.suite import Suite

_PREFIX = f"{FLOOR}-"


class TrainingSuite(Suite):
    """Steps of training, their peak memory, and as floor the products that a model's step cannot do without."""

    weighs: ClassVar[str] = "a step, beyond weights and optimizer state"

    def measures(self) -> tuple[str, ...]:
        return (TIME, MEMORY) if machine.counts_peak_memory() else (TIME,)

    def by_default(self, peer: str, case: Case) -> bool:
        """All of the suite's, but those that a size leaves to the command line."""
        return peer not in self.shapes[case.params["size"]].only_named

    def floor_of(self, peer: str) -> str:
        """Of the HBERTs only: the products of a BERT are other ones."""
        return _PREFIX + peer if peer.startswith("hbert-") else ""


def model_of(floor: str) -> str:
    """The model whose products a floor is made of."""
    return floor.removeprefix(_PREFIX)
