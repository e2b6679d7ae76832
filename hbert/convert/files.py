"""The files of a checkpoint folder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from hbert.data.storage import read_json
from hbert.errors import HbertError

# What sentence-transformers writes beside the files of its encoder.
SENTENCE_MODULES = "modules.json"
# In the order in which transformers prefers them.
_READERS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "model.safetensors": safetensors.torch.load_file,
    "pytorch_model.bin": partial(torch.load, map_location="cpu", weights_only=True),
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has a file with the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def read_config(folder: Path) -> PreTrainedConfig:
    """Returns the configuration of a checkpoint folder; no code of the checkpoint is run.

    Raises:
        HbertError: no such folder, no config.json in it, or one that transformers cannot read.
    """
    if not folder.is_dir():
        raise HbertError(
            f"no such folder: {folder}; a model of the hub: save it first, or pass what from_pretrained returns"
        )
    if not (folder / "config.json").is_file():
        raise HbertError(f"{folder} is not a model folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # JSON errors, unknown architectures and values that a configuration refuses are of unrelated types.
        raise HbertError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())}") from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold the weights of a checkpoint folder.

    Raises:
        HbertError: there are none, or some that the index names are missing.
    """
    for name in _READERS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _shards(index)
    raise HbertError(f"{folder} has no weights; allowed: {', '.join(_READERS)}, whole or in shards with an index")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a checkpoint folder by their names.

    Raises:
        HbertError: the weights are missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        read = next(reader for name, reader in _READERS.items() if file.suffix == Path(name).suffix)
        try:
            found = read(file)
            if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
                raise ValueError("it holds more than tensors by name")
            tensors |= found
        except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
            raise HbertError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return tensors


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise HbertError(f"{index} is not an index of weight files") from error
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise HbertError(f"{index.parent} lacks {', '.join(missing)}")
    return files
