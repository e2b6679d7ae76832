"""A run from its first worker to its last row: suite after suite, case after case, saved after each."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.artifacts import Artifacts
from bench.client import (
    ENGINE_MODULE,
    HEAP_ALL,
    HEAP_NONE,
    HEAP_OURS,
    PeerWorker,
    Setup,
    WorkerError,
    WorkerProcess,
    start_worker,
)
from bench.engines import OPENMP, family
from bench.harness import ALL_PEERS, TIME, Case, Failure, is_floor, measure
from bench.names import ENGINE_PEERS
from bench.progress import CaseProgress
from bench.report import Report
from bench.rows import Memory
from bench.suites.suite import Suite


@dataclass(frozen=True)
class SuitePlan:
    """What one suite is asked for."""

    suite: Suite
    candidates: tuple[str, ...]
    baselines: tuple[str, ...]
    cases: tuple[Case, ...]
    min_time: float

    @property
    def peers(self) -> tuple[str, ...]:
        floors = dict.fromkeys(filter(None, map(self.suite.floor_of, self.candidates)))
        return self.baselines + self.candidates + tuple(floors)

    @property
    def teams(self) -> list[tuple[str, ...]]:
        """The peers of each process."""
        return [self.peers] if self.suite.one_process else [(peer,) for peer in self.peers]

    def keeps_heap(self, team: tuple[str, ...], heap: str) -> bool:
        """Whether a process keeps freed memory. A floor always does: it is what the machine can do."""
        ours = all(peer in self.candidates for peer in team)
        return heap == HEAP_ALL or (heap == HEAP_OURS and ours) or all(map(is_floor, team))


def _start(suite: Suite, team: tuple[str, ...], setup: Setup, keep_heap: bool) -> WorkerProcess:
    if team[0] not in ENGINE_PEERS:
        return start_worker(suite.module, setup, keep_heap)
    return start_worker(ENGINE_MODULE, setup, keep_heap, openmp=family(team[0]) in OPENMP)


class Crew:
    """The workers of one suite. One that died in a case is started anew for the next."""

    def __init__(self, plan: SuitePlan, setup: Setup, report: Report) -> None:
        self._plan, self._setup, self._report = plan, setup, report
        self._workers: dict[tuple[str, ...], WorkerProcess] = {}
        self._unfit: set[tuple[str, ...]] = set()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # Ctrl-C while one ends leaves none of the others
            for worker in self._workers.values():
                stack.callback(worker.close)

    def ready(self, wanted: Collection[str]) -> dict[str, PeerWorker]:
        """Those of the wanted peers that can work, in the plan's order. A team that cannot even start fails once."""
        for team in [team for team, worker in self._workers.items() if not worker.alive]:
            self._workers.pop(team).close()
        teams = [team for team in self._plan.teams if not set(team).isdisjoint(wanted)]
        missing = [team for team in teams if team not in self._workers and team not in self._unfit]
        for team in missing:  # all at once: most of a start is imports
            keep_heap = self._plan.keeps_heap(team, self._setup.heap)
            self._workers[team] = _start(self._plan.suite, team, self._setup, keep_heap)
        for team in missing:
            self._greet(team)
        return {
            peer: PeerWorker(self._workers[team], peer)
            for team in teams
            if team in self._workers
            for peer in team
            if peer in wanted
        }

    def keep(self, wanted: Collection[str]) -> None:
        """Ends the workers of all other peers: their models would stay in memory."""
        for team in [team for team in self._workers if set(team).isdisjoint(wanted)]:
            self._workers.pop(team).close()

    def _greet(self, team: tuple[str, ...]) -> None:
        try:
            _note(self._report.about, self._workers[team].reply())
        except WorkerError as error:
            self._workers.pop(team).close()
            self._unfit.add(team)
            peer = team[0] if len(team) == 1 else ALL_PEERS
            self._report.failures.append(Failure(self._plan.suite.name, "", "", peer, f"no start: {error}"))


def _note(about: dict[str, Any], greeting: dict[str, Any]) -> None:
    """Adds what only a worker knows to the header."""
    about.update(greeting["versions"] | greeting["device"])
    if "pinning" in greeting:
        about["pinning"] = greeting["pinning"]
    if greeting.get("heap_refused"):
        about["heap_kept"] = HEAP_NONE
    if not greeting["queue_wait"]:
        about["disturbance"] = "unknown: this system has no schedstat, so no round was dropped"


def run(plans: Sequence[SuitePlan], setup: Setup, report: Report, save_report: Callable[[], Any]) -> None:
    """Measures all plans into `report`, and saves it after every case, so an interruption costs the case at hand."""
    with tempfile.TemporaryDirectory(prefix="hbert-bench-") as folder:
        for plan in plans:
            cases = _with_inputs(plan, Path(folder), report)
            with ExitStack() as stack:
                crew = stack.enter_context(Crew(plan, setup, report))
                artifacts = stack.enter_context(Artifacts(Path(folder), setup.cpus))
                progress = stack.enter_context(CaseProgress(plan.suite.name, len(cases)))
                for number, case in enumerate(cases):
                    progress.case(f"{case.name} {case.dtype}")
                    part = _part(plan, case)
                    timed = [later for later in cases[number:] if TIME in later.measures]
                    crew.keep({peer for later in timed for peer in _part(plan, later)})
                    case, part = artifacts.fitted(case, part, report.failures)
                    _run_case(case, part, plan, crew, setup, report, progress)
                    save_report()
                    progress.done()


def _part(plan: SuitePlan, case: Case) -> list[str]:
    """The peers that take part in a case."""
    return [peer for peer in plan.peers if case.peers is None or peer in case.peers]


def _run_case(
    case: Case, part: list[str], plan: SuitePlan, crew: Crew, setup: Setup, report: Report, progress: CaseProgress
) -> None:
    if TIME not in case.measures:
        memory = _weigh_all(case, part, plan, setup, report, progress)
        report.add_memory(memory, plan.candidates, plan.baselines)
        return
    report.add(measure(case, crew.ready(part), plan.min_time, progress.step), plan.candidates, plan.baselines)


def _weigh_all(
    case: Case, peers: list[str], plan: SuitePlan, setup: Setup, report: Report, progress: CaseProgress
) -> Memory:
    memory = Memory(case)
    for peer in peers:
        progress.step(f"{peer}: memory")
        try:
            process = _start(plan.suite, (peer,), setup, plan.keeps_heap((peer,), setup.heap))
            memory.peak[peer], memory.traits[peer] = _weigh(case, PeerWorker(process, peer), report)
        except WorkerError as error:
            report.failures.append(Failure(case.suite, case.name, case.dtype, peer, str(error)))
    return memory


def _weigh(case: Case, worker: PeerWorker, report: Report) -> tuple[int, dict[str, str]]:
    """A peer's memory, in a process of its own: what is left of other calls would hide a part of it."""
    try:
        _note(report.about, worker.process.reply())
        traits = worker.ask("prepare", case=dataclasses.asdict(case))["traits"]
        return worker.ask("peak_memory")["bytes"], traits
    finally:
        worker.process.close()


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
