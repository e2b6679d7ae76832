"""Optimized models on disk: the plain weights of the original, and a recipe that says how they were packed.

Packed weights depend on the processor and on the versions of libraries; plain ones do not, and every other tool reads
them. So a folder is a checkpoint as before, with one more file, and packing is done again when it is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel

import hbert
from hbert.convert.files import SENTENCE_MODULES, read_config, weight_files
from hbert.data.storage import read_json, write_json
from hbert.errors import HbertError
from hbert.evaluate.checkpoint import from_checkpoint
from hbert.pretrain.checkpoint import WRITE_ERRORS, complete_folder
from hbert_kernels import __version__

RECIPE = "hbert_optimize.json"
FORMAT = 1
_POOLER = "pooler."
_WEIGHTS, _CONFIGURATIONS = {".safetensors", ".bin"}, {"config.json", SENTENCE_MODULES}


class InMemory:
    """A model as the original of an optimized one: referred to, not copied.

    Changes are seen that torch counts or that move a tensor; those through ``.data`` are neither.
    """

    def __init__(self, model: nn.Module):
        self._model, self._weights = model, _state(model)

    def model(self) -> nn.Module:
        """The model.

        Raises:
            ValueError: it is seen to have changed since.
        """
        if _state(self._model) != self._weights:
            raise ValueError(
                f"the weights of this {type(self._model).__name__} were changed or moved after optimize(): optimize it"
                " again, then save"
            )
        return self._model


class OnDisk:
    """The model of a folder as the original: read again when it is asked for, so that it takes no memory until then."""

    def __init__(self, folder: Path):
        self._folder, self._files = folder.absolute(), _files(folder)

    def model(self) -> nn.Module:
        """The model.

        Raises:
            ValueError: the folder has changed since.
            HbertError: it cannot be loaded any more.
        """
        if not self._folder.is_dir() or _files(self._folder) != self._files:
            raise ValueError(f"{self._folder} was changed after optimize(): optimize it again, then save")
        return load_model(self._folder)


class Original:
    """What an optimized model was made of, so that it can be saved.

    Args:
        source: the original.
        dtype: what it was optimized for.
    """

    def __init__(self, source: InMemory | OnDisk, dtype: str):
        self._source, self._dtype = source, dtype

    def save_pretrained(self, folder: str | Path, *, push_to_hub: bool = False, **options: Any) -> None:
        """Writes the original's weights and configuration, and the recipe: what ``hbert.optimize(folder)`` loads.

        The folder appears when it is complete, or not at all. A tokenizer is saved beside it, afterwards.

        Args:
            options: of the original's ``save_pretrained``, such as ``max_shard_size``.

        Raises:
            HbertError: the folder is there and not empty, or it cannot be written.
            TypeError: the original's ``save_pretrained`` takes no such option.
            ValueError: the original has changed since it was optimized, or cannot be saved; ``push_to_hub``.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True would leave the recipe behind: call push_to_hub(repo_id) of the model")
        folder, model = Path(folder), self._source.model()
        save: Any = getattr(model, "save_pretrained", None)
        if save is None:
            kind = type(model).__name__
            raise ValueError(f"a {kind} has no save_pretrained: save what it is made of, and optimize it when loaded")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise HbertError(f"{folder} is not an empty folder; choose another")
        try:
            with complete_folder(folder) as temporary:
                save(str(temporary), **options)
                write_json(temporary / RECIPE, self._recipe())
        except WRITE_ERRORS as error:
            raise HbertError(f"{folder} could not be written: {error}") from error

    def _recipe(self) -> dict[str, Any]:
        versions = {"hbert": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {"format": FORMAT, "dtype": self._dtype, "versions": versions}


def _state(model: nn.Module) -> list[tuple[int, int]]:
    """What differs as soon as a tensor of the model was replaced, or written to other than through its ``data``."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """What differs as soon as a file of weights or configuration in the folder was written to or replaced."""
    found = [path for path in folder.rglob("*") if path.suffix in _WEIGHTS or path.name in _CONFIGURATIONS]
    return {path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def load_model(folder: Path) -> nn.Module:
    """Returns the model of a folder, in evaluation mode on the CPU: the class that its configuration names.

    Raises:
        HbertError: no such folder, or its files are missing, damaged or do not belong together.
    """
    if not folder.is_dir():
        raise HbertError(f"no such folder: {folder}; a model of the hub: optimize what from_pretrained returns")
    if (folder / SENTENCE_MODULES).is_file():
        return _sentence_transformer(folder)
    return load_pretrained(folder)


def load_pretrained(folder: Path) -> PreTrainedModel:
    """Returns the model of a folder that transformers loads, in evaluation mode on the CPU.

    Raises:
        HbertError: as in :func:`load_model`.
    """
    kind = _class_of(folder, read_config(folder))
    weight_files(folder)  # says what is missing
    model, info = from_checkpoint(str(folder), kind.from_pretrained, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    # An encoder is an encoder without it; a head that reads it is not.
    without_pooler = bool(missing) and all(name.startswith(_POOLER) for name in missing)
    if missing and not without_pooler:
        raise HbertError(f"{folder}: the weights are incomplete ({len(missing)} are missing, such as {missing[0]})")
    if without_pooler:
        model.pooler = None  # else it would be a random one
    return model.eval()


def _class_of(folder: Path, config: Any) -> Any:
    names = config.architectures
    if not names:
        return AutoModel
    for library in (hbert, transformers):
        found = getattr(library, names[0], None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise HbertError(f"{folder} holds a {names[0]}, which transformers {transformers.__version__} does not have")


def _sentence_transformer(folder: Path) -> nn.Module:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise HbertError(f"{folder} is for sentence-transformers, which is not installed") from error
    try:
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
    except Exception as error:
        # Damaged files, unknown modules and versions raise unrelated types.
        raise HbertError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error


def read_recipe(folder: Path) -> str | None:
    """Returns the dtype that the model of a folder was optimized for; None: the folder has no recipe.

    Raises:
        HbertError: the recipe is damaged, or of a later version.
    """
    path = folder / RECIPE
    if not path.is_file():
        return None
    try:
        recipe = read_json(path)
        version, dtype, writer = int(recipe["format"]), str(recipe["dtype"]), recipe["versions"]["hbert"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise HbertError(f"{path} is damaged; optimize({str(folder)!r}, dtype) does without it") from error
    if version > FORMAT:
        raise HbertError(f"{path} was written by hbert {writer} in format {version}; this one reads {FORMAT}: upgrade")
    return dtype
