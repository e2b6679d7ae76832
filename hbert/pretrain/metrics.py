"""What a run measures: means over steps, lines of metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbert.errors import HbertError

from .engine import StepResult


@dataclass
class Meter:
    """Sums over steps, from which their means come."""

    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    masked: int = 0
    tokens: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(self, result: StepResult, tokens: int, seconds: float) -> None:
        """Adds one step."""
        self.steps += 1
        self.loss += result.loss * result.masked
        self.correct += result.correct
        self.masked += result.masked
        self.tokens += tokens
        self.grad_norm += result.grad_norm
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        """Loss and accuracy over the masked tokens; gradient norm and seconds over the steps."""
        return {
            "loss": self.loss / self.masked,
            "accuracy": self.correct / self.masked,
            "grad_norm": self.grad_norm / self.steps,
            "step_seconds": self.seconds / self.steps,
        }

    @property
    def tokens_per_second(self) -> float:
        """Tokens that entered the model, masked or not, a second."""
        return self.tokens / self.seconds


def check_log(path: Path, offset: int) -> None:
    """Checks that the lines up to ``offset`` are there, before a run goes on behind them.

    Raises:
        HbertError: the file is missing or shorter.
    """
    found = path.stat().st_size if path.is_file() else None
    if found is None or found < offset:
        state = "is missing" if found is None else f"has {found:,} bytes"
        raise HbertError(f"--resume: {path} {state}, but the checkpoint needs its first {offset:,} bytes")


class MetricsLog:
    """metrics.jsonl: one JSON object a line. Opening it at ``offset`` drops what stands behind."""

    def __init__(self, path: Path, offset: int) -> None:
        self._file = open(path, "r+b")  # noqa: SIM115  closed by close()
        self._file.truncate(offset)
        self._file.seek(offset)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line, visible to other programs at once."""
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Brings all lines to the disk and returns the length of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Events:
    """TensorBoard events, where tensorboard is installed (``installed`` says so)."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            # Also at step 0: the attempt before may have died behind it.
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self.installed = self._writer is not None

    def write(self, entry: dict[str, Any]) -> None:
        """Draws every number of a line of metrics.jsonl at its step."""
        if self._writer is None:
            return
        for name, value in entry.items():
            if isinstance(value, int | float) and name not in ("step", "tokens", "num_masked"):
                self._writer.add_scalar(f"{entry['kind']}/{name}", value, entry["step"])

    def close(self) -> None:
        """Brings all events to the disk."""
        if self._writer is not None:
            self._writer.close()
