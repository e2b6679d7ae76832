"""One peer in a process of its own: `worker.py SUITE PEER CPUS`, JSON lines in, JSON lines out (see client.py)."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

if __name__ == "__main__":  # this folder's own place on the path goes; an installed hbert comes before the checkout
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from bench import machine
from bench.harness import Case
from bench.suites import SUITES

BRIEF = 0.25  # seconds: a call below this is estimated from the best of three


class Task(Protocol):
    """What a suite builds for one peer and one case."""

    def step(self) -> object:
        """One call: what is timed."""

    def check(self) -> tuple[float, float]:
        """(error against the reference of the same weights, largest error allowed)."""

    def traits(self) -> dict[str, str]:
        """`isa` and `backend` that the call uses."""


def _time(task: Task) -> float:
    start = time.perf_counter()
    task.step()
    return time.perf_counter() - start


class Server:
    """Answers the coordinator's requests for one peer; each public method is one request."""

    def __init__(self, suite: str, peer: str) -> None:
        self._build = importlib.import_module(SUITES[suite].module).task
        self._peer = peer
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        if self._task is None:
            raise RuntimeError("no case is prepared")
        return self._task

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self._task = None  # the last case's memory goes before this one's is taken
        self._task = self._build(self._peer, Case(**case))
        return {"traits": self.task.traits()}

    def check(self) -> dict[str, Any]:
        error, allowed = self.task.check()
        return {"error": error, "allowed": allowed}

    def estimate(self) -> dict[str, Any]:
        seconds = _time(self.task)
        if seconds < BRIEF:
            seconds = min(_time(self.task) for _ in range(3))
        return {"seconds": seconds}

    def run(self, calls: int) -> dict[str, Any]:
        if calls > 1:
            self.task.step()  # the other peers have just used the caches, and this team of threads has gone to sleep
        waited, start = machine.queue_wait(), time.perf_counter()
        seconds = [_time(self.task) for _ in range(calls)]
        wall, now = time.perf_counter() - start, machine.queue_wait()
        return {"seconds": seconds, "wait": None if waited is None or now is None else (now - waited) / wall}


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
    from bench.peers import settle

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


def main(suite: str, peer: str, cpus: str) -> None:
    protocol = _own_stdout()

    def send(answer: dict[str, Any]) -> None:
        protocol.write(json.dumps(answer) + "\n")

    greeting = _guarded(_greeting, [int(cpu) for cpu in cpus.split(",")])
    send(greeting)
    if "failed" in greeting:
        return
    server = Server(suite, peer)
    for line in sys.stdin:
        send(_guarded(_answer, server, json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
