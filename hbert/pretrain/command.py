"""``hbert pretrain``: trains a masked language model under a budget of time."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from hbert.data.terminal import output_console
from hbert.data.tokenizer import tokenizer_file
from hbert.errors import HbertError
from hbert_kernels.memory import keep_heap

from . import folder
from .checkpoint import newest_checkpoint
from .options import add_arguments, given_options, overridden
from .settings import Settings, differences, resolve, run_folder
from .trainer import Outcome, pretrain


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    add_arguments(subparsers.add_parser("pretrain", help=summary, description=summary))


def run(args: argparse.Namespace) -> None:
    """Runs the command; leaves with status 130 or 143 after SIGINT or SIGTERM, with a checkpoint saved."""
    started = time.monotonic()
    keep_heap()
    disable_progress_bar()
    options = given_options(args)
    settings, record = resolve_run(options)
    outcome = pretrain(settings, record["options"] if record else options, record, started)
    _report(settings.out, outcome)


def resolve_run(options: dict[str, Any]) -> tuple[Settings, dict[str, Any] | None]:
    """Returns the settings of these options and, to resume, the record of the run that they take up.

    With --resume, options that are not given are those that the run began with; where its tokenizer is gone, the
    newest checkpoint has it.

    Raises:
        ValueError, HbertError: a wrong option, --out is no run to take up, or other settings than those that
            the run began with.
    """
    if not options.get("resume"):
        return resolve(options), None
    out = run_folder(options)
    record = folder.read_record(out)
    settings = resolve(overridden(record["options"], {**options, "out": str(out)}))
    if changed := differences(record["settings"], settings.identity):
        raise HbertError(f"--resume: {out} was begun with other settings: {', '.join(changed)}")
    # Another tokenizer that is asked for is not replaced without a word.
    if settings.tokenizer and "tokenizer" not in options and not tokenizer_file(settings.tokenizer).is_file():
        settings = replace(settings, tokenizer=str(newest_checkpoint(out)))
    return settings, record


def _report(out: Path, outcome: Outcome) -> None:
    if outcome.signal is not None:
        if outcome.main:
            _print(f"stopped after step {outcome.step:,}; go on with: hbert pretrain --resume --out {out}")
        raise SystemExit(128 + outcome.signal)
    if (result := outcome.evaluation) is not None:
        _print(
            f"{outcome.status} after {outcome.step:,} steps, {result['tokens']:,} tokens: held-out loss "
            f"{result['loss']:.3f}, masked accuracy {result['accuracy']:.4f}; model in {out}"
        )


def _print(line: str) -> None:
    output_console().print(line, markup=False, soft_wrap=True)
