"""What a run found, and the CSV and JSON files made of it."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import Failure, Result, Slice
from bench.rows import COLUMNS, Memory, Row, memory_of, memory_rows, time_rows
from bench.stats import drift
from hbert.data.storage import replacing

MOST_DROPPED = 0.1  # of all slices, on a quiet machine
MOST_DRIFT = 0.1  # of the canary


@dataclass
class Report:
    """Everything that a run found. `about` is the header, `rows` have the keys `COLUMNS`, `left_out` are peers that are
    not installed, `slices` counts the undisturbed ones, `canary` has its seconds in each round.
    """

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    slices: int = 0
    canary: list[float] = field(default_factory=list)
    left_out: list[Failure] = field(default_factory=list)

    def disturbances(self) -> list[str]:
        """What shows that the machine was not quiet; figures of such a run are not to be relied on."""
        found = []
        tried = self.dropped + self.slices
        if self.dropped > MOST_DROPPED * tried:
            found.append(f"{self.dropped} of {tried} slices were disturbed by other load")
        if self.canary and drift(self.canary) > MOST_DRIFT:
            found.append(
                f"the same computation took from {1e3 * min(self.canary):.3g} to "
                f"{1e3 * max(self.canary):.3g} ms: other load, or a clock that changes"
            )
        return found

    def add(self, result: Result, candidates: Sequence[str], baselines: Sequence[str]) -> None:
        """Takes in one timed case: a row for each baseline, and for each candidate one against every baseline."""
        case = result.case
        self.rows += time_rows(result, candidates, baselines, self.about)
        self.add_memory(memory_of(result), candidates, baselines)
        self.failures += result.failures
        self.dropped += result.dropped
        self.slices += sum(map(len, result.rounds))
        self.canary += result.canary
        self.rounds += [
            {
                "suite": case.suite,
                "case": case.name,
                "dtype": case.dtype,
                "round": number,
                "peers": {peer: _stored(part) for peer, part in done.items()},
            }
            for number, done in enumerate(result.rounds)
        ]

    def add_memory(self, memory: Memory, candidates: Sequence[str], baselines: Sequence[str]) -> None:
        """Takes in the memory of one case."""
        self.rows += memory_rows(memory, candidates, baselines, self.about)


def _stored(part: Slice) -> dict[str, Any]:
    """Four digits of each call are more than a clock gives, and keep the file small."""
    return {"seconds": [float(f"{seconds:.4g}") for seconds in part.seconds], "wait": part.wait}


def check_writable(folder: Path) -> None:
    """Makes the result folder, and a file in it, before hours are measured.

    Raises:
        OSError: it cannot be made, or nothing can be written to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def save(report: Report, folder: Path, stem: str) -> list[Path]:
    """Writes STEM.csv and STEM.json, each complete or not at all, and returns their paths."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in report.rows)
    record = asdict(report) | {"disturbances": report.disturbances()}
    texts = {f"{stem}.csv": table.getvalue(), f"{stem}.json": json.dumps(record, indent=1) + "\n"}
    paths = [folder / name for name in texts]
    for path in paths:
        with replacing(path) as temporary:
            temporary.write_text(texts[path.name])
    return paths


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
