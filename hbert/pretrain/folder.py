"""The run folder: run.json, metrics.jsonl, checkpoints, and at the end the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from hbert.data.storage import content_key, move_files, read_json, remains, write_json
from hbert.errors import HbertError

from .checkpoint import CHECKPOINTS, WRITE_ERRORS, save_checkpoint, write_model
from .lock import LOCK, locked
from .optimizers import Optimizers

RUN, METRICS, EVENTS = "run.json", "metrics.jsonl", "tensorboard"
FORMAT = 1
# What takes part in the result besides the settings; compared on --resume.
_COMPARED = ("corpus", "tokenizer")
# What a run that is taken up reads, to its model card at the end.
_NEEDED = (
    *("options", "settings", "model", "parameters", "init", *_COMPARED, "plan", "max_steps", "step_seconds"),
    *("dtype", "processes", "eval", "machine", "software", "times"),
)


@contextmanager
def claimed(out: Path, new: bool) -> Iterator[None]:
    """Keeps other processes from training into a folder while the block runs; makes the folder of a new run, empty.

    Raises:
        HbertError: another process trains into it, it cannot be written to, or a new run's is not empty.
    """
    with ExitStack() as held:
        with _writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out))
            _probe(out)
        if new:
            check_new(out)
        yield


def check_new(out: Path) -> None:
    """Checks that the folder of a new run is empty; what a run has left that was killed before it began is removed.

    Raises:
        HbertError: it is not empty or cannot be written to.
    """
    with _writing_to(out):
        if _is_false_start(out):
            shutil.rmtree(out / CHECKPOINTS)
            (out / METRICS).unlink(missing_ok=True)
            _remove_record_remains(out)
        taken = any(path.name != LOCK for path in out.iterdir())
    if taken:
        what = "holds a run: go on with --resume" if (out / RUN).is_file() else "is not empty"
        raise HbertError(f"--out {out} {what}, or choose another folder")


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HbertError(f"--out {out} cannot be written to: {error.strerror}") from error


def _probe(out: Path) -> None:
    with TemporaryFile(dir=out):
        pass


def _is_false_start(out: Path) -> bool:
    """Tells whether a run was killed while ``create`` was at work: nothing but its first files is there."""
    names = {path.name for path in out.iterdir()} - {LOCK, *(path.name for path in remains(out, RUN))}
    if CHECKPOINTS not in names or names - {CHECKPOINTS, METRICS}:
        return False
    first = all("step-00000000" in path.name for path in (out / CHECKPOINTS).iterdir())
    return first and (METRICS not in names or (out / METRICS).stat().st_size == 0)


def remove_remains(out: Path) -> None:
    """Removes what a killed run has left half-written."""
    for path in remains(out / CHECKPOINTS):
        shutil.rmtree(path, ignore_errors=True)
    _remove_record_remains(out)


def _remove_record_remains(out: Path) -> None:
    for path in remains(out, RUN):
        path.unlink(missing_ok=True)


def create(
    out: Path,
    record: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    optimizers: Optimizers,
    state: Mapping[str, Any],
) -> None:
    """Writes the checkpoint of step 0, an empty log, and last run.json, which makes the folder that of a run.

    Raises:
        HbertError: a file could not be written, as on a full disk.
    """
    save_checkpoint(out, 0, model, tokenizer, optimizers, {"run": record_digest(record), **state}, keep=1)
    try:
        (out / METRICS).touch()
        write_json(out / RUN, record)
    except OSError as error:
        raise HbertError(f"{out} could not be written: {error}") from error


def read_record(out: Path) -> dict[str, Any]:
    """Returns run.json of a run folder.

    Raises:
        HbertError: there is none, it is not one of ours, or an entry is missing.
    """
    path = out / RUN
    if not path.is_file():
        raise HbertError(f"--resume: {out} is not a run folder (no {RUN}); give it as --out, or start without --resume")
    try:
        record = read_json(path)
        if (format := record.get("format")) != FORMAT:
            raise ValueError(f"its format is {format!r}, not {FORMAT}")
        if missing := [name for name in _NEEDED if name not in record]:
            raise ValueError(f"it has no {', '.join(missing)}")
        return record
    except (OSError, ValueError, AttributeError) as error:
        raise HbertError(f"{path} is not the record of a run of this version of hbert: {error}") from error


def record_digest(record: Mapping[str, Any]) -> str:
    """Names what a checkpoint belongs to: settings, plan and text of its run."""
    return content_key(record["settings"], record["plan"], *(record[name] for name in _COMPARED))


def text_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names the parts of the text that are not those that the run began with."""
    return [name for name in _COMPARED if before[name] != now[name]]


def update(out: Path, **entries: Any) -> dict[str, Any]:
    """Changes entries of run.json and returns all of it."""
    record = read_json(out / RUN) | entries
    write_json(out / RUN, record)
    return record


def export(out: Path, model: PreTrainedModel, tokenizer: Tokenizer, card: str) -> None:
    """Writes model, configuration, tokenizer and model card: the folder that the Auto classes load.

    Raises:
        HbertError: a file could not be written, as on a full disk; the checkpoints are intact.
    """
    # A fixed name: the one that a killed run left is taken over.
    temporary = out / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write_model(temporary, model, tokenizer)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        move_files(temporary, out)
    except WRITE_ERRORS as error:
        raise HbertError(f"the model could not be written: {error}; make room and use --resume") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
