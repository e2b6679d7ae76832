"""Checkpoints that are complete or not there, and the proof of it on reading."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from hbert.data.storage import move_complete, read_json, sha256_file, temporary_sibling, write_json
from hbert.data.tokenizer import save_tokenizer
from hbert.errors import HbertError

from .optimizers import Optimizers

CHECKPOINTS = "checkpoints"
_MODEL, _OPTIMIZERS, _STATE = "model.safetensors", "optimizers.pt", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
# What full disks and size limits make the writers of Python, torch and safetensors raise.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)

_Parsed = TypeVar("_Parsed")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``folder``, absent or empty before, once it is on the disk."""
    temporary = temporary_sibling(folder)
    temporary.mkdir()
    try:
        yield temporary
        move_complete(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(
    out: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    optimizers: Optimizers,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes ``out/checkpoints/step-XXXXXXXX`` and then drops all but the last ``keep``; returns its path.

    It is a model folder, with what the next step needs beside the weights.

    Raises:
        HbertError: it could not be written, as on a full disk; those before it are intact.
    """
    folder = out / CHECKPOINTS / f"step-{step:08}"
    before = checkpoints(out)
    try:
        # A run that was taken up may pass a step that it has been at before.
        if folder not in before:
            with complete_folder(folder) as temporary:
                _write(temporary, step, model, tokenizer, optimizers, state)
    except WRITE_ERRORS as error:
        left = f"; {before[-1]} is intact, go on from it with --resume" if before else ""
        raise HbertError(f"the checkpoint of step {step} could not be written: {error}{left}") from error
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return folder


def write_model(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Writes what the Auto classes load: model, configuration and tokenizer."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)


def _write(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    optimizers: Optimizers,
    state: Mapping[str, Any],
) -> None:
    write_model(folder, model, tokenizer)
    with open(folder / _OPTIMIZERS, "wb") as file:
        torch.save(optimizers.state(), file)
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / _STATE, {"step": step, "files": files, **state})


def checkpoints(out: Path) -> list[Path]:
    """Returns the checkpoints of a run folder, oldest first."""
    folder = out / CHECKPOINTS
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(out: Path) -> Path:
    """Returns the newest checkpoint of a run folder.

    Raises:
        HbertError: there is none.
    """
    if not (found := checkpoints(out)):
        raise HbertError(f"--resume: no checkpoint in {out / CHECKPOINTS}; {_start_again(out)}")
    return found[-1]


def read_state(checkpoint: Path, parse: Callable[[Mapping[str, Any]], _Parsed]) -> _Parsed:
    """Returns what ``parse`` makes of a checkpoint's state after checking that its files are those that were written.

    Raises:
        HbertError: a file is missing or has changed, or ``parse`` raised KeyError or TypeError.
    """
    try:
        state = read_json(checkpoint / _STATE)
        for name, digest in state["files"].items():
            if sha256_file(checkpoint / name) != digest:
                raise ValueError(f"{name} is not what was written")
        return parse(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HbertError(f"the checkpoint {checkpoint} is corrupt ({error}); {_remedy(checkpoint)}") from error


def _remedy(checkpoint: Path) -> str:
    """What to do without this checkpoint."""
    out = checkpoint.parent.parent
    if checkpoint in checkpoints(out)[1:]:
        return "remove it to go on from the one before it"
    return f"there is none before it: {_start_again(out)}"


def _start_again(out: Path) -> str:
    # Without --resume alone, a folder that holds a run is refused.
    return f"start again in another folder, or remove {out}"


def load_weights(checkpoint: Path, model: PreTrainedModel, optimizers: Optimizers) -> None:
    """Puts the parameters and the optimizers' state of a checkpoint in place.

    Raises:
        HbertError: they do not fit the model.
    """
    try:
        safetensors.torch.load_model(model, str(checkpoint / _MODEL))
        optimizers.load(torch.load(checkpoint / _OPTIMIZERS, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise HbertError(f"the checkpoint {checkpoint} does not fit this model: {error}") from error
