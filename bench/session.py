"""A run from its first worker to its last row: suite after suite, case after case, saved after each."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import WorkerError, WorkerProcess, start_worker
from bench.harness import ALL_PEERS, Case, Effort, Failure, measure
from bench.progress import CaseProgress
from bench.report import Report
from bench.suites import Suite


@dataclass(frozen=True)
class SuitePlan:
    """What one suite is asked for."""

    suite: Suite
    candidates: tuple[str, ...]
    baselines: tuple[str, ...]
    cases: tuple[Case, ...]

    @property
    def peers(self) -> tuple[str, ...]:
        return self.baselines + self.candidates


class Crew:
    """The workers of one suite. One that died in a case is started anew for the next."""

    def __init__(self, plan: SuitePlan, cpus: list[int], report: Report) -> None:
        self._plan, self._cpus, self._report = plan, cpus, report
        self._workers: dict[str, WorkerProcess] = {}
        self._unfit: set[str] = set()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def ready(self) -> dict[str, WorkerProcess]:
        """All peers that can work, in the plan's order. A peer that cannot even start fails once, for all cases."""
        for peer in [peer for peer, worker in self._workers.items() if not worker.alive]:
            self._workers.pop(peer).close()
        missing = [peer for peer in self._plan.peers if peer not in self._workers and peer not in self._unfit]
        for peer in missing:  # all at once: most of a start is imports
            self._workers[peer] = start_worker(self._plan.suite.name, peer, self._cpus)
        for peer in missing:
            self._greet(peer)
        return {peer: self._workers[peer] for peer in self._plan.peers if peer in self._workers}

    def _greet(self, peer: str) -> None:
        try:
            _note(self._report.about, self._workers[peer].reply())
        except WorkerError as error:
            self._workers.pop(peer).close()
            self._unfit.add(peer)
            self._report.failures.append(Failure(self._plan.suite.name, "", "", peer, f"no start: {error}"))


def _note(about: dict[str, Any], greeting: dict[str, Any]) -> None:
    """Adds what only a worker knows to the header."""
    about.update(greeting["versions"])
    about.update(pinning=greeting["pinning"], heap=greeting["heap"])
    if not greeting["queue_wait"]:
        about["disturbance"] = "unknown: this system has no schedstat, so no round was dropped"


def run(
    plans: Sequence[SuitePlan], cpus: list[int], effort: Effort, report: Report, save_report: Callable[[], Any]
) -> None:
    """Measures all plans into `report`, and saves it after every case, so an interruption costs the case at hand."""
    with tempfile.TemporaryDirectory(prefix="hbert-bench-") as folder:
        for plan in plans:
            cases = _with_inputs(plan, Path(folder), report)
            with ExitStack() as stack:
                crew = stack.enter_context(Crew(plan, cpus, report))
                progress = stack.enter_context(CaseProgress(plan.suite.name, len(cases)))
                for case in cases:
                    progress.case(f"{case.name} {case.dtype}")
                    result = measure(case, crew.ready(), effort, progress.step)
                    report.add(result, plan.candidates, plan.baselines)
                    save_report()
                    progress.done()


def _with_inputs(plan: SuitePlan, folder: Path, report: Report) -> list[Case]:
    """The cases with the paths of their shared inputs; those whose inputs cannot be had become failures."""
    if plan.suite.inputs is None:
        return list(plan.cases)
    ready = []
    for case in plan.cases:
        try:
            made = plan.suite.inputs(case, folder)
        except Exception as error:  # e.g. no network for the text: the other suites still run
            reason = f"no inputs: {type(error).__name__}: {error}"
            report.failures.append(Failure(case.suite, case.name, case.dtype, ALL_PEERS, reason))
            continue
        ready.append(dataclasses.replace(case, params={**case.params, **made}))
    return ready
