"""One forward in a runtime beside torch, in a process without it; held against torch's output of the same weights."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bench import machine
from bench.cpu import Cpu
from bench.engines import DISTRIBUTIONS, family
from bench.engines.engine import Forward, Variants
from bench.harness import Case
from bench.task import Task

_TRIALS, _TRIAL_SECONDS = 3, 0.3  # of a variant: so many calls and so long at least; the fastest counts


class EngineForward(Task):
    """`step` is one forward of the case's batches in the fastest of the peer's variants."""

    resident = True

    def __init__(self, peer: str, case: Case, device: Cpu) -> None:
        self._peer, self._case, self._device = peer, case, device
        params = case.params
        self._engine = importlib.import_module(f"bench.engines.{family(peer)}")
        with np.load(params["expected"][peer]) as stored:
            self._right, self._allowed = stored["right"], float(stored["allowed"])
            count = sum(name.startswith("ids") for name in stored.files)
            self._batches = [(stored[f"ids{i}"], stored[f"mask{i}"]) for i in range(count)]
        variants = self._engine.variants(peer, params["graphs"][peer], params["cpus"])
        self._variant, self._forwards = self._fastest(variants)

    def _fastest(self, variants: Variants) -> tuple[str, list[Forward]]:
        """The variant with the shortest call. One at a time is loaded: each has its own copy of the weights."""
        seconds = {}
        if len(variants) > 1:
            for name, load in variants.items():
                seconds[name] = _shortest(self._prepared(load))
        name = min(seconds, key=seconds.__getitem__, default=next(iter(variants)))
        return name, self._prepared(variants[name])

    def _prepared(self, load: Callable[[], Any]) -> list[Forward]:
        machine.confine(self._case.params["cpus"])  # threads begin where the one that starts them may run
        engine = load()
        forwards = [engine.prepared(ids, mask) for ids, mask in self._batches]
        _each(forwards)
        self._threads = machine.bind(machine.busy_threads(partial(_each, forwards)), self._case.params["cpus"])
        return forwards

    def step(self) -> list[Any]:
        return _each(self._forwards)

    def check(self) -> tuple[float, float]:
        """Error of the last hidden state, padding left out, by the rule of forward_gate.expected."""
        states = zip(self.step(), self._batches, strict=True)
        rows = np.concatenate([np.asarray(state)[mask == 1] for state, (_, mask) in states])
        wrong = rows.astype(self._right.dtype) - self._right
        if self._peer.endswith("int8"):
            return float(np.linalg.norm(wrong) / np.linalg.norm(self._right)), self._allowed
        return float(np.abs(wrong).max()), self._allowed

    def traits(self) -> dict[str, str]:
        package = DISTRIBUTIONS[family(self._peer)]
        backend = f"{package} {importlib.metadata.version(package)}, {self._variant}, {self._threads}"
        return {"isa": "", "backend": backend}

    def peak_memory(self) -> int:
        """As of suites.latency.Forward."""
        return self._device.peak(self.step)


def _each(forwards: list[Forward]) -> list[Any]:
    return [forward() for forward in forwards]


def _shortest(forwards: list[Forward]) -> float:
    shortest, calls, begun = float("inf"), 0, time.perf_counter()
    while calls < _TRIALS or time.perf_counter() - begun < _TRIAL_SECONDS:
        start = time.perf_counter()
        _each(forwards)
        shortest, calls = min(shortest, time.perf_counter() - start), calls + 1
    return shortest


def builder(case: Case, device: Cpu) -> Callable[[str], EngineForward]:
    """What builds each peer's task of `case`."""
    return lambda peer: EngineForward(peer, case, device)
