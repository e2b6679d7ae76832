"""What runtimes beside torch need for a case, had from the exporter's process as it comes to be needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.client import WorkerError, WorkerProcess, start_exporter
from bench.harness import Case, Failure
from bench.names import ENGINE_PEERS, fixed_dtype


class Artifacts:
    """Exported models and expected outputs, in `folder`; a context that ends the exporter."""

    def __init__(self, folder: Path, cpus: list[int]) -> None:
        self._folder, self._cpus = str(folder), cpus
        self._exporter: WorkerProcess | None = None

    def __enter__(self) -> Artifacts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the exporter, so that it neither works nor holds memory while others are timed."""
        if self._exporter is not None:
            self._exporter.close()
        self._exporter = None

    def fitted(self, case: Case, peers: Sequence[str], failures: list[Failure]) -> tuple[Case, list[str]]:
        """The case with all that its workers load, and the peers that can take part; the others become failures."""
        graphs: dict[str, Any] = {}
        right: dict[str, str] = {}
        fit = []
        for peer in peers:
            if peer in ENGINE_PEERS:
                try:
                    graphs[peer] = self._ask("graphs", peer=peer, case=case)["paths"]
                    right[peer] = self._ask("expected", dtype=fixed_dtype(peer), case=case)["path"]
                except WorkerError as error:
                    failures.append(Failure(case.suite, case.name, case.dtype, peer, f"no export: {error}"))
                    continue
            fit.append(peer)
        self.close()
        if graphs:
            loads = {"graphs": graphs, "expected": right, "cpus": self._cpus}
            case = dataclasses.replace(case, params={**case.params, **loads})
        return case, fit

    def _ask(self, do: str, case: Case, **arguments: Any) -> dict[str, Any]:
        if self._exporter is None or not self._exporter.alive:
            self.close()
            self._exporter = start_exporter()
            self._exporter.reply()
        return self._exporter.ask(do, case=dataclasses.asdict(case), folder=self._folder, **arguments)
