"""The protocol: equality gate, then interleaved rounds in changing order, disturbed rounds dropped and counted."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

from bench import canary
from bench.client import WorkerError

DISTURBED = 0.04  # share of the wall time for which our threads stood ready, but another process had the core
SLICES = 10  # a candidate that is fast enough spends its minimum time in this many rounds
TRIES = 3  # a disturbed slice of a round is repeated, at most this often in all; then the round is given up
PATIENCE = 2  # a case may take this many times the time it takes on a quiet machine,
GRACE = 4.0  # and this many seconds: one burst of other load is longer than a whole case of the kernels
# Relative, in int8: above what each way of quantizing has been seen to cost, and below what a layer left out does.
INT8_ERROR, INT8_PEER_ERROR = 0.1, 0.3
# Fewer undisturbed rounds than this give no row: five have no 95% interval of their median (stats.median_interval).
FEWEST = 6
ALL_PEERS = "all peers"
FLOOR = "floor"
TIME, MEMORY = "time", "memory"


@dataclass(frozen=True)
class Case:
    """One thing to measure. `work` is what one call gets done, in the unit of the suite's rate (tokens, bytes).

    `peers` are those that take part, of the suite's; None: all. `measures`: TIME, in rounds, or MEMORY, or both.
    """

    suite: str
    name: str
    dtype: str
    batch: int
    seq: int
    work: float
    params: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] | None = None
    measures: tuple[str, ...] = (TIME,)

    @property
    def measures_memory(self) -> bool:
        return MEMORY in self.measures


@dataclass(frozen=True)
class Failure:
    """A peer for which a case has no row, and why."""

    suite: str
    case: str
    dtype: str
    peer: str
    reason: str


@dataclass(frozen=True)
class Gate:
    """Error of a peer against the reference of the same weights, and the largest error that lets it be timed."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Slice:
    """What one peer did in one round: seconds of each call, and the share of the wall spent waiting for a core."""

    seconds: tuple[float, ...]
    wait: float | None

    @property
    def disturbed(self) -> bool:
        return self.wait is not None and self.wait > DISTURBED

    @property
    def typical(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True)
class Estimate:
    """What a peer takes: seconds of a call, and the calls before each of its slices that are not timed."""

    seconds: float
    untimed: int

    def slice_seconds(self, calls: int) -> float:
        return (self.untimed + calls) * self.seconds


Round = dict[str, Slice]


@dataclass
class Result:
    """A case as measured: its undisturbed rounds, seconds of the canary in each round, bytes of memory, the number of
    disturbed slices, and what failed.

    The peers with times are those in `gates`; every round has a slice of each of them.
    """

    case: Case
    gates: dict[str, Gate] = field(default_factory=dict)
    traits: dict[str, dict[str, str]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    canary: list[float] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    failures: list[Failure] = field(default_factory=list)

    def fail(self, peer: str, reason: str) -> None:
        """A failure that takes a peer out of the case."""
        self.gates.pop(peer, None)
        self.note(peer, reason)

    def fail_all(self, reason: str) -> None:
        """A failure that leaves the case without times."""
        self.gates.clear()
        self.note(ALL_PEERS, reason)

    def note(self, peer: str, reason: str) -> None:
        """A failure that takes nothing away."""
        case = self.case
        self.failures.append(Failure(case.suite, case.name, case.dtype, peer, reason))


def is_floor(peer: str) -> bool:
    """Whether a peer is what the machine can do, and not a model or an op."""
    return peer.startswith(FLOOR)


class Worker(Protocol):
    """What the protocol needs of a peer's process."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]: ...


Notify = Callable[[str], None]


def measure(case: Case, workers: Mapping[str, Worker], min_time: float, notify: Notify) -> Result:
    """Gates and times `case` for every worker; a peer that fails has no part in the result but its failure."""
    result = Result(case)
    estimates: dict[str, Estimate] = {}
    for peer, worker in workers.items():
        notify(f"{peer}: equality gate")
        try:
            estimates[peer] = _admit(peer, worker, result)
        except WorkerError as error:
            result.fail(peer, str(error))
    if result.gates:
        _run_rounds(result, workers, estimates, min_time, notify)
    if case.measures_memory:
        _weigh(result, workers, notify)
    return result


def _weigh(result: Result, workers: Mapping[str, Worker], notify: Notify) -> None:
    """Behind the rounds, because what a peer has kept from its first call is no part of a later one's peak."""
    for peer in [name for name in result.gates if not is_floor(name)]:
        notify(f"{peer}: memory")
        try:
            result.peak[peer] = workers[peer].ask("peak_memory")["bytes"]
        except WorkerError as error:
            result.note(peer, f"memory: {error}")


def _admit(peer: str, worker: Worker, result: Result) -> Estimate:
    """Prepares one peer, holds it against its reference and estimates what it takes."""
    result.traits[peer] = worker.ask("prepare", case=asdict(result.case))["traits"]
    gate = Gate(**worker.ask("check"))
    if not gate.passed:
        raise WorkerError(f"not timed: wrong by {gate.error:.3g} against the reference, {gate.allowed:.3g} is allowed")
    estimate = worker.ask("estimate")
    result.traits[peer] |= estimate["traits"]
    result.gates[peer] = gate
    return Estimate(estimate["seconds"], estimate["untimed"])


def plan_rounds(estimates: Mapping[str, Estimate], min_time: float) -> tuple[dict[str, int], int]:
    """Timed calls of each peer in a round, and the number of rounds.

    Each peer gets calls of `min_time` seconds at least, the untimed ones included, and `FEWEST` rounds.
    """
    share = min_time / SLICES
    calls = {peer: max(1, math.ceil(share / estimate.seconds)) for peer, estimate in estimates.items()}
    shortest = min(estimate.slice_seconds(calls[peer]) for peer, estimate in estimates.items())
    return calls, max(FEWEST, math.ceil(min_time / shortest))


def order_of(peers: list[str], turn: int) -> list[str]:
    """The order of a round, the same in every run.

    In as many rounds as there are peers each has every place once; then they are shuffled, so that none follows the
    same one for long.
    """
    block, at = divmod(turn, len(peers))
    order = random.Random(block).sample(peers, len(peers))
    return order[at:] + order[:at]


def _run_rounds(
    result: Result, workers: Mapping[str, Worker], estimates: Mapping[str, Estimate], min_time: float, notify: Notify
) -> None:
    calls, wanted = plan_rounds({peer: estimates[peer] for peer in result.gates}, min_time)
    expected = wanted * sum(estimates[peer].slice_seconds(calls[peer]) for peer in calls)
    deadline = time.monotonic() + max(PATIENCE * expected, GRACE)
    turn = 0
    while result.gates and len(result.rounds) < wanted and (turn < FEWEST or time.monotonic() < deadline):
        notify(f"round {len(result.rounds) + 1} of {wanted}, {result.dropped} disturbed")
        result.canary.append(canary.sing())
        done = _run_round(result, workers, calls, turn)
        turn += 1
        if done is not None:
            result.rounds.append(done)
    if result.gates and len(result.rounds) < FEWEST:
        result.fail_all(
            f"{len(result.rounds)} of {turn} rounds were undisturbed by other load, {FEWEST} are needed: "
            "free the cores, or use fewer with --threads"
        )


def _run_round(result: Result, workers: Mapping[str, Worker], calls: Mapping[str, int], turn: int) -> Round | None:
    """One round; None if a peer failed in it (it is out, the others go on) or found no undisturbed moment."""
    done: Round = {}
    for peer in order_of(list(result.gates), turn):
        try:
            part = _undisturbed(workers[peer], calls[peer], result)
        except WorkerError as error:
            result.fail(peer, str(error))
            return None
        if part is None:
            return None
        done[peer] = part
    return done


def _undisturbed(worker: Worker, calls: int, result: Result) -> Slice | None:
    """A slice of one peer. A disturbed one is counted and repeated at once: most other load comes in short bursts."""
    for _ in range(TRIES):
        answer = worker.ask("run", calls=calls)
        part = Slice(tuple(answer["seconds"]), answer["wait"])
        if not part.disturbed:
            return part
        result.dropped += 1
    return None
