"""The folder that a fine-tuning leaves: whole or not there, and never over somebody's files."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from hbert.errors import HbertError
from hbert.pretrain.checkpoint import complete_folder

RESULTS = "results.json"


def check_output(out: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Checks that the folder may be written.

    Args:
        inputs: files and folders that are read; none of them may be in a folder that is replaced.

    Raises:
        HbertError: it exists and ``overwrite`` is not given, or is not the result of a fine-tuning, or holds
            an input; or its parent cannot be written to.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        _check_replaceable(out, overwrite, inputs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise HbertError(f"--out {out} cannot be written: {error.strerror}") from error


def _check_replaceable(out: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    if not overwrite:
        raise HbertError(f"--out {out} exists; choose another folder, or replace it with --overwrite")
    if not (out / RESULTS).is_file():
        raise HbertError(f"--out {out} is not the result of a fine-tuning (no {RESULTS}): --overwrite leaves it alone")
    whole = out.resolve()
    for path in inputs:
        if whole in (path.resolve(), *path.resolve().parents):
            raise HbertError(f"--out {out} cannot be replaced: {path} is read from it")


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of ``out`` and of what was there, once complete."""
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.old")
    try:
        with complete_folder(out) as temporary:
            yield temporary
            if out.exists():
                os.rename(out, aside)
    except BaseException:
        if aside.exists() and not out.exists():
            os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
