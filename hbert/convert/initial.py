"""Weights of a checkpoint as the first ones of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hbert.data.storage import sha256_file
from hbert.data.tokenizer import load_tokenizer
from hbert.errors import HbertError
from hbert.modeling import HBertPreTrainedModel

from .correspondence import check_fits, transfer
from .files import weight_files
from .source import Source, read_source


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint folder that has been read, and which part of it is used (one of ``PARTS``)."""

    folder: Path
    parts: str
    source: Source

    @classmethod
    def read(cls, folder: str | Path, parts: str) -> InitialWeights:
        """Reads the folder; errors are those of :func:`hbert.convert.read_source`."""
        return cls(Path(folder), parts, read_source(folder))

    def check(self, config: PreTrainedConfig, tokenizer: str | Path) -> None:
        """Checks that a model and the tokenizer of its text go with these weights.

        Raises:
            ValueError: another width or number of tokens.
            HbertError: the folder has a tokenizer, with other tokens or other ids of them.
        """
        check_fits(self.source, config)
        own = self.folder / "tokenizer.json"
        if own.is_file() and load_tokenizer(own).get_vocab() != load_tokenizer(tokenizer).get_vocab():
            raise HbertError(f"the vocabulary of {tokenizer} is not that of the weights in {self.folder}")

    def apply(self, model: HBertPreTrainedModel) -> dict[str, Any]:
        """Puts the weights in place; returns what run.json says of it: origin, number of parameters, tensors.

        Raises:
            ValueError: another width or number of tokens; nothing was changed.
        """
        report = transfer(self.source, model, self.parts)
        files = {file.name: sha256_file(file) for file in weight_files(self.folder)}
        moved = sum(model.get_parameter(name).numel() for name in report.moved)
        origin = {"from": str(self.folder), "parts": self.parts, "sha256": files}
        return {**origin, "parameters": moved, **report.record()}
