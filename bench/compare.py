"""What has changed since an earlier run: its CSV against the rows of this one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.client import HEAP_NONE, WorkerError, WorkerProcess
from bench.report.results import read_results
from bench.stats import FASTER, NO_DIFFERENCE, SLOWER
from bench.suites import SUITES
from hbert.errors import HbertError
from hbert.processor import label

SLACK_MS = 0.030  # a change of a time by less is none, whatever its percentage (xformers' rule)
THRESHOLD = 0.05
_KEY = ("suite", "case", "candidate", "dtype", "device")
# In a process of its own: this one does not load the kernels.
_PROBE = f"""
import json, sys
sys.path[:] = [*sys.path[1:], {json.dumps(str(machine.ROOT))}]
import hbert_kernels
print(json.dumps({{"isa": hbert_kernels.cpu_capability(), "keeps_heap": hbert_kernels.keep_heap()}}))
"""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One row in both runs. `change` is of the time a call takes: 0.1 is 10% slower, -0.1 faster."""

    key: Key
    unit: str
    old: float
    new: float
    change: float
    verdict: str

    @property
    def ours(self) -> bool:
        """Whether the row is about a candidate; a peer that is slower says something of the machine."""
        return is_ours(self.key[0], self.key[2])


def is_ours(suite: str, candidate: str) -> bool:
    """Whether the rows of a suite that name this candidate are about a model or an op of ours."""
    return suite in SUITES and candidate in SUITES[suite].candidates


def read(path: Path, cpu: Mapping[str, str], threads: int, heap: str) -> dict[Key, float]:
    """The medians of a run's CSV. `cpu`: what machine.identity says; `heap`: whose processes keep freed memory in this
    run, if the C library can.

    Raises:
        ValueError: not such a file; or one of another processor (name, or model where both are known), number of
            threads or policy of freed memory, or with another instruction set level of our CPU kernels; or these do
            not load.
    """
    try:
        rows = [row.cells for row in read_results(path).rows]
    except HbertError as error:
        raise ValueError(f"--compare: {error}") from None
    if not rows:
        raise ValueError(f"--compare {path}: nothing was measured")
    _check_machine(path, rows, cpu, threads)
    _check_kernels(path, rows, heap)
    return _medians(rows)


def _check_machine(path: Path, rows: Iterable[Mapping[str, str]], cpu: Mapping[str, str], threads: int) -> None:
    """Raises ValueError where processor or threads are others; a model that is not known is no other one."""
    here, there = (cpu["cpu"], str(threads)), {(row.get("cpu", ""), row.get("threads", "")) for row in rows}
    models = {row["cpu_model"] for row in rows if row.get("cpu_model")}
    if there != {here} or ("cpu_model" in cpu and models - {cpu["cpu_model"]}):
        told = "; ".join(sorted({f"{label({'cpu': '', **row})}, {row.get('threads', '')} threads" for row in rows}))
        raise ValueError(f"--compare {path}: measured on {told}; this is {label(cpu)}, {threads} threads")


def _check_kernels(path: Path, rows: Iterable[Mapping[str, str]], heap: str) -> None:
    """Raises ValueError where memory policy or level are others: then a change is not one of the code."""
    try:
        isa, keeps_heap = kernels()
    except WorkerError as error:
        raise ValueError(f"--compare: the kernels do not load: {error}") from error
    levels = {
        row.get("isa", "")
        for row in rows
        if row.get("device", "cpu") == "cpu" and is_ours(row["suite"], row["candidate"])
    }
    for what, there, here in (
        ("heap_kept", {row.get("heap_kept", "") for row in rows}, heap if keeps_heap else HEAP_NONE),
        ("isa of ours", levels, isa),
    ):
        if there - {here}:
            told = ", ".join(sorted(there))
            raise ValueError(f"--compare {path}: measured with {what} {told or 'unknown'}; in this run it is {here}")


def kernels() -> tuple[str, bool]:
    """The level of our CPU kernels in this environment, and whether its C library can keep freed memory.

    Raises:
        WorkerError: they do not load.
    """
    process = WorkerProcess([sys.executable, "-c", _PROBE], {})
    try:
        told = process.reply()
    finally:
        process.close()
    return told["isa"], told["keeps_heap"]


def _medians(rows: Iterable[Mapping[str, Any]]) -> dict[Key, float]:
    """Of the rows of each suite's own metric; those of a candidate against several baselines are one."""
    return {
        tuple(row.get(name, "") for name in _KEY): float(row["median"])
        for row in rows
        if row["suite"] in SUITES and row["metric"] == SUITES[row["suite"]].metric.name
    }


def lost(old: Iterable[Key], changes: Iterable[Change]) -> list[Key]:
    """The rows of ours of an earlier run that have no counterpart in this one."""
    found = {change.key for change in changes}
    return [key for key in old if is_ours(key[0], key[2]) and key not in found]


def compare(old: Mapping[Key, float], rows: Sequence[Mapping[str, Any]], threshold: float) -> list[Change]:
    """What is in both, in the order of `rows`."""
    return [_change(key, old[key], new, threshold) for key, new in _medians(rows).items() if key in old]


def _change(key: Key, old: float, new: float, threshold: float) -> Change:
    metric = SUITES[key[0]].metric
    change = old / new - 1 if metric.per_second else new / old - 1
    small = abs(change) <= threshold or (metric.unit == "ms" and abs(new - old) <= SLACK_MS)
    return Change(key, metric.unit, old, new, change, NO_DIFFERENCE if small else SLOWER if change > 0 else FASTER)
