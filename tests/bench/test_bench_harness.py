"""The protocol, on workers that only write down what they are asked."""

import dataclasses
import hashlib
import math
import threading
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import harness, machine
from bench.client import WorkerError
from bench.harness import (
    ALL_PEERS,
    DISTURBED,
    FEWEST,
    MEMORY,
    TIME,
    TRIES,
    Case,
    Estimate,
    measure,
    order_of,
    plan_rounds,
)
from hbert.processor import queue_wait

CASE = Case("latency", "1x7", "fp32", 1, 7, work=7)
TRAITS = {"isa": "none", "backend": "reference"}


class FakeWorker:
    """Answers at once: right by `error`, `seconds` a call, waiting for its core as `waits` says (then never)."""

    def __init__(self, name, log, *, error=0.0, seconds=0.25, untimed=1, waits=(), fails_at=None, peak=None):
        self.name, self.log, self.error, self.seconds, self.untimed = name, log, error, seconds, untimed
        self.waits, self.fails_at, self.peak, self.runs = list(waits), fails_at, peak, 0

    def ask(self, do, **arguments):
        self.log.append((self.name, do))
        if do == "prepare":
            return {"traits": TRAITS}
        if do == "check":
            return {"error": self.error, "allowed": 0.1}
        if do == "estimate":
            return {"seconds": self.seconds, "untimed": self.untimed, "traits": {"backend": "as timed"}}
        if do == "peak_memory":
            if self.peak is None:
                raise WorkerError("not counted here")
            return {"bytes": self.peak}
        self.runs += 1
        if self.runs == self.fails_at:
            raise WorkerError("out of memory")
        return {"seconds": [self.seconds] * arguments["calls"], "wait": self.waits.pop(0) if self.waits else 0.0}


def run(min_time=1.0, case=CASE, **workers):
    log = []
    made = {name: FakeWorker(name, log, **settings) for name, settings in workers.items()}
    return measure(case, made, min_time, notify=lambda text: None), log, made


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_peer_has_every_place_and_every_predecessor(count):
    peers = [f"p{i}" for i in range(count)]
    orders = [order_of(peers, turn) for turn in range(20 * count)]
    for start in range(0, len(orders), count):
        for places in zip(*orders[start : start + count], strict=True):
            assert sorted(places) == peers
    assert {pair for order in orders for pair in pairwise(order)} == set(permutations(peers, 2))


def test_rounds_are_interleaved_in_changing_order():
    _, log, _ = run(a={}, b={}, c={})
    ran = [name for name, do in log if do == "run"]
    assert [ran[i : i + 3] for i in range(0, len(ran), 3)] == [order_of(list("abc"), turn) for turn in range(FEWEST)]


def test_nothing_is_timed_before_every_peer_has_passed_its_gate():
    _, log, _ = run(a={}, b={})
    asked = [do for _, do in log]
    assert max(i for i, do in enumerate(asked) if do == "check") < asked.index("run")


@pytest.mark.parametrize("error", [0.100001, math.inf, math.nan])
def test_gate_refuses_to_time_a_wrong_peer(error):
    result, log, _ = run(right={}, wrong={"error": error})
    assert {do for name, do in log if name == "wrong"} == {"prepare", "check"}
    assert list(result.gates) == ["right"] and all(set(done) == {"right"} for done in result.rounds)
    (failure,) = result.failures
    assert (failure.peer, failure.case, failure.dtype) == ("wrong", "1x7", "fp32")
    assert "not timed" in failure.reason and "0.1 is allowed" in failure.reason


def test_the_canary_sings_in_every_round(monkeypatch):
    songs = iter(range(1, 99))
    monkeypatch.setattr(harness.canary, "sing", lambda: next(songs))
    result, _, _ = run(a={}, b={"waits": [1.0] * TRIES})
    assert result.canary == list(range(1, FEWEST + 2)) and len(result.rounds) == FEWEST  # one round was given up


def test_the_canary_is_a_short_computation():
    assert 1e-5 < harness.canary.sing() < 1.0


def test_an_error_at_the_tolerance_passes():
    result, _, _ = run(a={"error": 0.1})
    assert result.gates["a"].error == 0.1 and not result.failures


def test_a_disturbed_slice_is_dropped_counted_and_repeated():
    result, log, _ = run(a={"waits": [0.0, 2 * DISTURBED]}, b={"waits": [3 * DISTURBED, DISTURBED]})
    assert (result.dropped, len(result.rounds)) == (2, FEWEST)
    assert all(part.wait <= DISTURBED for done in result.rounds for part in done.values())
    assert Counter(name for name, do in log if do == "run") == {"a": FEWEST + 1, "b": FEWEST + 1}


def test_a_round_without_an_undisturbed_moment_is_given_up():
    result, log, _ = run(a={}, b={"waits": [1.0] * TRIES})
    assert (result.dropped, len(result.rounds)) == (TRIES, FEWEST)
    assert order_of(["a", "b"], 0) == ["b", "a"]  # so that a had no turn in that round
    assert Counter(name for name, do in log if do == "run") == {"a": FEWEST, "b": FEWEST + TRIES}


def test_a_busy_machine_gives_no_figures(monkeypatch):
    monkeypatch.setattr(harness, "GRACE", 0.05)
    result, _, _ = run(0.001, a={"seconds": 1e-4, "waits": [1.0] * 10**6}, b={"seconds": 1e-4})
    assert not result.gates and len(result.rounds) < FEWEST and result.dropped >= FEWEST * TRIES
    (failure,) = result.failures
    assert failure.peer == ALL_PEERS and "undisturbed" in failure.reason


def test_nothing_is_dropped_where_waiting_is_unknown():
    result, _, _ = run(a={"waits": [None] * 99})
    assert result.dropped == 0 and len(result.rounds) == FEWEST


def test_a_peer_that_fails_leaves_the_others_their_rounds():
    result, _, workers = run(a={}, b={"fails_at": 2}, c={})
    assert [(failure.peer, failure.reason) for failure in result.failures] == [("b", "out of memory")]
    assert list(result.gates) == ["a", "c"] and len(result.rounds) == FEWEST
    assert all({"a", "c"} <= set(done) for done in result.rounds) and workers["b"].runs == 2


def test_memory_is_asked_for_behind_the_rounds_and_not_of_floors():
    case = dataclasses.replace(CASE, measures=(TIME, MEMORY))
    workers = {"a": {"peak": 5}, "b": {}, "floor-a": {"peak": 7}}
    result, log, _ = run(case=case, **workers)
    assert [name for name, do in log if do == "peak_memory"] == ["a", "b"]
    assert log[-3][1] == "run" and result.peak == {"a": 5}
    assert [(failure.peer, failure.reason) for failure in result.failures] == [("b", "memory: not counted here")]
    assert list(result.gates) == list(workers) and len(result.rounds) == FEWEST


def test_memory_is_not_asked_for_unless_the_case_wants_it():
    result, log, _ = run(a={"peak": 5})
    assert not result.peak and "peak_memory" not in {do for _, do in log}


def test_traits_are_those_of_what_is_timed():
    result, _, _ = run(a={})
    assert result.traits["a"] == {**TRAITS, "backend": "as timed"}


def test_slow_peers_get_the_least_rounds_and_fast_ones_share_the_time():
    fast, slow = Estimate(0.001, untimed=1), Estimate(1.5, untimed=1)
    calls, rounds = plan_rounds({"fast": fast, "slow": slow}, 2.0)
    assert calls == {"fast": 200, "slow": 1}
    assert rounds * calls["fast"] * fast.seconds >= 2.0 and rounds == 10
    assert plan_rounds({"slow": slow}, 2.0) == ({"slow": 1}, FEWEST)


@pytest.mark.parametrize("untimed, rounds", [(0, 10), (1, 7), (2, FEWEST)])
def test_untimed_calls_cost_rounds_and_not_time(untimed, rounds):
    assert plan_rounds({"a": Estimate(0.1, untimed)}, 1.95) == ({"a": 2}, rounds)


def test_the_time_that_a_case_may_take_has_room_for_its_untimed_calls(monkeypatch):
    """Every slice is disturbed once, so the case takes twice its time, which it may; a slice has 10 + 3 calls."""
    worker = FakeWorker("a", [], seconds=0.2, untimed=3, waits=[1.0, 0.0] * 8)
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: worker.runs * 13 * 0.2))
    result = measure(CASE, {"a": worker}, 20.0, notify=lambda text: None)
    assert (len(result.rounds), result.dropped) == (8, 8)


def test_two_threads_on_one_core_wait_for_each_other():
    done, told, block = threading.Barrier(3), threading.Event(), bytes(16 << 20)

    def work():
        machine.confine(machine.cores()[:1])
        hashlib.sha256(block)
        done.wait()
        told.wait()  # a thread that has ended is counted no more

    before = queue_wait()
    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    done.wait()
    after = queue_wait()
    told.set()
    if Path("/proc/self/schedstat").exists():
        assert after - before > 0.001
    else:
        assert before is None and after is None
