"""A process in which peers are measured: `worker.py MODULE CPUS DEVICE HEAP`, JSON lines in and out (client.py).

MODULE offers `builder`; those under bench.engines do without torch, and so does their process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if __name__ == "__main__":  # this folder's own place on the path goes; an installed hbert comes before the checkout
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from bench import machine
from bench.client import ENGINES, KEPT, end_with_coordinator
from bench.harness import Case
from hbert.processor import queue_wait

if TYPE_CHECKING:
    from bench.device import Step
    from bench.task import Task

BRIEF = 0.25  # seconds: a call below this is estimated from the best of three
SMALL = 0.01  # seconds: in a shorter call on a GPU the host's work counts, and a captured graph is without it
EXIT_SECONDS = 10
SAMPLES = 100  # a slice of more calls is timed in this many groups: microseconds are too short for the clock


class Server:
    """Answers the coordinator's requests; each public method is one request, for one of the peers of this process."""

    def __init__(self, module: str, device: Any) -> None:
        self._builder = importlib.import_module(module).builder
        self._device = device
        self._start = device.held() if machine.counts_peak_memory() else 0
        self._case: dict[str, Any] | None = None
        self._build: Callable[[str], Any] | None = None
        self._tasks: dict[str, Any] = {}
        self._steps: dict[str, Step] = {}  # what is timed: the task's own, or a captured graph of it

    def prepare(self, peer: str, case: dict[str, Any]) -> dict[str, Any]:
        """Builds the peer's task of a case (the fields of harness.Case); its traits."""
        if case != self._case or self._build is None:
            self._tasks.clear()  # the last case's memory goes before this one's is taken
            self._steps.clear()
            self._build = None
            self._build, self._case = self._builder(Case(**case), self._device), case
        for held in (self._tasks, self._steps):
            held.pop(peer, None)
        self._tasks[peer] = self._build(peer)
        return {"traits": self._tasks[peer].traits()}

    def check(self, peer: str) -> dict[str, Any]:
        """The fields of harness.Gate."""
        error, allowed = self._tasks[peer].check()
        return {"error": error, "allowed": allowed}

    def estimate(self, peer: str) -> dict[str, Any]:
        """The fields of harness.Estimate, and the traits of what is timed from here on: the task, or its graph."""
        task: Task = self._tasks[peer]
        self._steps[peer], traits = task.step, {}
        seconds = self._seconds(task, task.step)
        if self._device.has_graphs and task.capturable and seconds < SMALL:
            self._steps[peer], note = self._device.captured(task.step)
            traits = {"backend": f"{task.traits()['backend']}, {note}"}
            seconds = self._seconds(task, self._steps[peer])
        return {"seconds": seconds, "untimed": self._device.untimed, "traits": traits}

    def _seconds(self, task: Task, step: Step) -> float:
        """Of one call; of a short one the best of three."""
        (seconds,) = self._device.time(step, 1, 1, task.flushed)
        return min(self._device.time(step, 1, 3, task.flushed)) if seconds < BRIEF else seconds

    def run(self, peer: str, calls: int) -> dict[str, Any]:
        """Seconds of a call, one for each group of calls; the share of the wall spent waiting for a core, if known."""
        task, step = self._tasks[peer], self._steps[peer]
        self._device.warm_up(step)
        group = 1 if task.flushed else -(-calls // SAMPLES)
        waited, start = queue_wait(), time.perf_counter()
        seconds = self._device.time(step, group, -(-calls // group), task.flushed)
        wall, now = time.perf_counter() - start, queue_wait()
        return {"seconds": seconds, "wait": None if waited is None or now is None else (now - waited) / wall}

    def peak_memory(self, peer: str) -> dict[str, Any]:
        """Bytes; of a resident task without what the process held before its first model."""
        task = self._tasks[peer]
        return {"bytes": task.peak_memory() - (self._start if task.resident else 0)}


def _own_stdout() -> TextIO:
    """Keeps the standard output for the protocol; what libraries print goes to the standard error."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return protocol


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _with_torch(cpus: list[int], device: str, keep_heap: bool) -> dict[str, Any]:
    from bench.device import open_device
    from bench.runtime import settle

    heap_kept = settle(len(cpus), keep_heap)
    return {
        "pinning": machine.check_pinning(cpus),
        "heap_refused": keep_heap and not heap_kept,
        "device": open_device(device).describe(),
    }


def _without_torch(cpus: list[int], device: str) -> dict[str, Any]:
    """A runtime binds its threads itself; what is checked is which of them work in a call (engines.forward)."""
    from bench.cpu import Cpu

    if device != Cpu.name:
        raise RuntimeError(f"measured on {Cpu.name} only")
    machine.confine(cpus)
    return {"device": Cpu().describe()}


def _greeting(module: str, cpus: list[int], device: str, keep_heap: bool) -> dict[str, Any]:
    foreign = module.startswith(ENGINES)
    return {
        **(_without_torch(cpus, device) if foreign else _with_torch(cpus, device, keep_heap)),
        "queue_wait": queue_wait() is not None,
        "versions": {package: _version(package) for package in ("torch", "transformers")},
    }


def _opened(module: str, device: str) -> Any:
    if module.startswith(ENGINES):
        from bench.cpu import Cpu

        return Cpu()
    from bench.device import open_device

    return open_device(device)


def _answer(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    do = request.pop("do")
    return getattr(server, do)(**request)


def _guarded(action: Any, *arguments: Any) -> dict[str, Any]:
    """The action's answer, or its failure in one line: one bad case must not take the peer's other cases along."""
    try:
        return action(*arguments)
    except Exception as error:
        import traceback

        traceback.print_exc()
        said = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {said[0]}"}


def serve(greet: Callable[[], dict[str, Any]], server_of: Callable[[], Any]) -> None:
    """Sends the greeting, then the answer to each request, until the input ends; without a greeting nothing more."""
    protocol = _own_stdout()

    def send(answer: dict[str, Any]) -> None:
        protocol.write(json.dumps(answer) + "\n")

    try:
        greeting = _guarded(greet)
        send(greeting)
        if "failed" in greeting:
            return
        server = server_of()
        for line in sys.stdin:
            send(_guarded(_answer, server, json.loads(line)))
    finally:
        # What runtimes do at exit may wait for their threads without end, and nobody may be left to kill this process.
        signal.alarm(EXIT_SECONDS)


def main(module: str, cpus: str, device: str, heap: str) -> None:
    end_with_coordinator()
    numbers = [int(cpu) for cpu in cpus.split(",")]
    serve(lambda: _greeting(module, numbers, device, heap == KEPT), lambda: Server(module, _opened(module, device)))


if __name__ == "__main__":
    main(*sys.argv[1:])
