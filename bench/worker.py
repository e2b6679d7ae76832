"""A process in which one peer, or several, are measured: `worker.py SUITE CPUS`, JSON lines in and out (client.py)."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

if __name__ == "__main__":  # this folder's own place on the path goes; an installed hbert comes before the checkout
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from bench import machine
from bench.harness import Case
from bench.suites import SUITES

BRIEF = 0.25  # seconds: a call below this is estimated from the best of three
SAMPLES = 100  # a slice of more calls is timed in this many groups: microseconds are too short for the clock


class Task(Protocol):
    """What a suite builds for one peer and one case."""

    def step(self) -> object:
        """One call: what is timed."""

    def check(self) -> tuple[float, float]:
        """(error against the reference of the same weights, largest error allowed)."""

    def traits(self) -> dict[str, str]:
        """`isa` and `backend` that the call uses."""


def _time(task: Task, calls: int = 1) -> float:
    """Seconds a call, over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        task.step()
    return (time.perf_counter() - start) / calls


class Server:
    """Answers the coordinator's requests; each public method is one request, for one of the peers of this process."""

    def __init__(self, suite: str) -> None:
        self._builder = importlib.import_module(SUITES[suite].module).builder
        self._case: dict[str, Any] | None = None
        self._build: Callable[[str], Any] | None = None
        self._tasks: dict[str, Any] = {}

    def prepare(self, peer: str, case: dict[str, Any]) -> dict[str, Any]:
        if case != self._case or self._build is None:
            self._tasks.clear()  # the last case's memory goes before this one's is taken
            self._build = None
            self._build, self._case = self._builder(Case(**case)), case
        self._tasks.pop(peer, None)
        self._tasks[peer] = self._build(peer)
        return {"traits": self._tasks[peer].traits()}

    def check(self, peer: str) -> dict[str, Any]:
        error, allowed = self._tasks[peer].check()
        return {"error": error, "allowed": allowed}

    def estimate(self, peer: str) -> dict[str, Any]:
        task = self._tasks[peer]
        seconds = _time(task)
        if seconds < BRIEF:
            seconds = min(_time(task) for _ in range(3))
        return {"seconds": seconds}

    def run(self, peer: str, calls: int) -> dict[str, Any]:
        task = self._tasks[peer]
        if calls > 1:
            task.step()  # the other peers have just used the caches, and this team of threads has gone to sleep
        group = -(-calls // SAMPLES)
        waited, start = machine.queue_wait(), time.perf_counter()
        seconds = [_time(task, group) for _ in range(-(-calls // group))]
        wall, now = time.perf_counter() - start, machine.queue_wait()
        return {"seconds": seconds, "wait": None if waited is None or now is None else (now - waited) / wall}

    def peak_memory(self, peer: str) -> dict[str, Any]:
        return {"bytes": self._tasks[peer].peak_memory()}


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


def _greeting(cpus: list[int]) -> dict[str, Any]:
    from bench.runtime import settle

    heap = settle(len(cpus))
    return {
        "pinning": machine.check_pinning(cpus),
        "heap": heap,
        "queue_wait": machine.queue_wait() is not None,
        "versions": {package: _version(package) for package in ("torch", "transformers")},
    }


def _answer(server: Server, request: dict[str, Any]) -> dict[str, Any]:
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


def main(suite: str, cpus: str) -> None:
    protocol = _own_stdout()

    def send(answer: dict[str, Any]) -> None:
        protocol.write(json.dumps(answer) + "\n")

    greeting = _guarded(_greeting, [int(cpu) for cpu in cpus.split(",")])
    send(greeting)
    if "failed" in greeting:
        return
    server = Server(suite)
    for line in sys.stdin:
        send(_guarded(_answer, server, json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
