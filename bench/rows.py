"""From the seconds of the rounds to rows of one long form: times, rates, and what is left to the machine's floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from bench.harness import Case, Result, is_floor
from bench.stats import Ratio, Spread, drift, median_interval, paired_ratio, spread
from bench.suites import SUITES
from bench.suites.suite import FLOOR_RATIO, FLOP_RATE, PEAK_MEMORY, Metric

COLUMNS = (
    "suite", "case", "candidate", "baseline", "dtype", "batch", "seq", "metric", "unit", "median", "p10", "p90", "p99",
    "median_lo", "median_hi", "ratio", "ratio_lo", "ratio_hi", "verdict", "max_err", "rounds", "dropped", "canary_ms",
    "canary_drift", "device", "threads", "heap_kept", "isa", "backend", "torch", "cpu", "cpu_model",
    "git", "date",
)  # fmt: skip
Row = dict[str, Any]
Peers = Sequence[str]


@dataclass(frozen=True)
class Memory:
    """A case that measures memory: bytes and traits of each peer that could be measured."""

    case: Case
    peak: dict[str, int] = field(default_factory=dict)
    traits: dict[str, dict[str, str]] = field(default_factory=dict)


def time_rows(result: Result, candidates: Peers, baselines: Peers, about: Mapping[str, Any]) -> list[Row]:
    """The rows of a timed case: those of its suite's metric, then, where it has a floor, rates and floor ratios."""
    case = result.case
    suite = SUITES[case.suite]
    rows = [_time_row(result, suite.metric, *pair, about) for pair in _pairs(result.gates, candidates, baselines)]
    floors = [peer for peer in result.gates if is_floor(peer)]
    rate = suite.rate(case) if floors else None
    rows += [_time_row(result, suite.metric, floor, "", about) for floor in floors]
    rows += [_time_row(result, rate, peer, "", about) for peer in result.gates if rate is not None]
    rows += [_flop_row(result, peer, about) for peer in result.gates if _flops(result, peer)]
    pairs = ((peer, suite.floor_of(peer)) for peer in result.gates)
    rows += [_floor_row(result, peer, floor, about) for peer, floor in pairs if floor in floors]
    return rows


def memory_of(result: Result) -> Memory:
    """The memory of a case that was timed too, as a case of its own name."""
    case = dataclasses.replace(result.case, name=f"{result.case.name}/peak")
    return Memory(case, result.peak, result.traits)


def memory_rows(memory: Memory, candidates: Peers, baselines: Peers, about: Mapping[str, Any]) -> list[Row]:
    """The rows of a case that measures memory: one measurement for each peer, so neither spread nor interval."""
    return [
        _row(
            memory.case,
            PEAK_MEMORY,
            pair,
            spread([PEAK_MEMORY.scale * memory.peak[pair[0]]]),
            _exact_ratio(memory.peak, *pair),
            about,
            memory.traits[pair[0]],
        )
        for pair in _pairs(memory.peak, candidates, baselines)
    ]


def _pairs(measured: Mapping[str, Any], candidates: Peers, baselines: Peers) -> Iterator[tuple[str, str]]:
    """Each baseline by itself, then each candidate against every baseline; against "" where there is none."""
    present = [peer for peer in baselines if peer in measured]
    yield from ((peer, peer) for peer in present)
    yield from ((ours, peer) for ours in candidates if ours in measured for peer in present or [""])


def _time_row(result: Result, metric: Metric, candidate: str, baseline: str, about: Mapping[str, Any]) -> Row:
    rounds = [[metric.value(s, result.case.work) for s in done[candidate].seconds] for done in result.rounds]
    ratio = _ratio(result, metric, candidate, baseline) if baseline else None
    return _result_row(result, metric, (candidate, baseline), rounds, ratio, about)


def _flops(result: Result, peer: str) -> float:
    """Operations of the floor's products, for the floor and for whom it is one; 0 where they are not told."""
    floor = peer if is_floor(peer) else SUITES[result.case.suite].floor_of(peer)
    return float(result.traits.get(floor, {}).get("gflop", 0)) * 1e9 if floor in result.gates else 0.0


def _flop_row(result: Result, peer: str, about: Mapping[str, Any]) -> Row:
    """How many of its floor's operations a second a peer gets done."""
    rounds = [[FLOP_RATE.value(s, _flops(result, peer)) for s in done[peer].seconds] for done in result.rounds]
    return _result_row(result, FLOP_RATE, (peer, ""), rounds, None, about)


def _ratio(result: Result, metric: Metric, candidate: str, baseline: str) -> Ratio:
    """Above 1 the candidate is better: baseline / candidate for times, candidate / baseline for rates."""
    work = result.case.work
    ours, theirs = (
        [metric.value(done[peer].typical, work) for done in result.rounds] for peer in (candidate, baseline)
    )
    return paired_ratio(ours, theirs) if metric.per_second else paired_ratio(theirs, ours)


def _floor_row(result: Result, peer: str, floor: str, about: Mapping[str, Any]) -> Row:
    """How many times its floor's time a peer takes, round by round."""
    ours, best = ([done[name].typical for done in result.rounds] for name in (peer, floor))
    times = [[mine / least] for mine, least in zip(ours, best, strict=True)]
    return _result_row(result, FLOOR_RATIO, (peer, floor), times, paired_ratio(best, ours), about)


def _result_row(
    result: Result,
    metric: Metric,
    pair: tuple[str, str],
    rounds: Sequence[Sequence[float]],
    ratio: Ratio | None,
    about: Mapping[str, Any],
) -> Row:
    """`rounds`: the values of the calls of each."""
    row = _row(result.case, metric, pair, spread(list(chain(*rounds))), ratio, about, result.traits[pair[0]])
    low, high = median_interval(np.array([median(values) for values in rounds]))
    judged = ratio is not None and metric != FLOOR_RATIO and pair[0] != pair[1]
    return row | {
        "median_lo": low,
        "median_hi": high,
        "verdict": ratio.verdict if ratio is not None and judged else "",
        "max_err": result.gates[pair[0]].error,
        "rounds": len(result.rounds),
        "dropped": result.dropped,
        "canary_ms": 1e3 * median(result.canary) if result.canary else None,
        "canary_drift": drift(result.canary) if result.canary else None,
    }


def _exact_ratio(peak: Mapping[str, int], candidate: str, baseline: str) -> Ratio | None:
    if not baseline:
        return None
    ratio = peak[baseline] / max(1, peak[candidate])
    return Ratio(ratio, ratio, ratio)


def _row(
    case: Case,
    metric: Metric,
    pair: tuple[str, str],
    values: Spread,
    ratio: Ratio | None,
    about: Mapping[str, Any],
    traits: Mapping[str, str],
) -> Row:
    cells = (
        case.suite, case.name, *pair, case.dtype, case.batch, case.seq, metric.name, metric.unit,
        values.median, values.p10, values.p90, values.p99, None, None,
        ratio and ratio.value, ratio and ratio.low, ratio and ratio.high, "", None, 1, 0, None, None,
        about["device"], about["threads"], about["heap_kept"], traits["isa"], traits["backend"],
        about["torch"], about["cpu"], about.get("cpu_model", ""), about["git"], about["date"],
    )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))
