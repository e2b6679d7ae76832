"""A real checkpoint in place of random weights, as the coordinator sees it: its configuration only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.names import BERT_OPTIMIZED, ENGINE_PEERS, LOADED, LOADED_OPTIMIZED, PATCHED, TORCH_PEERS

_CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers reads; `positions` is its longest sequence."""

    folder: Path
    kind: str
    positions: int

    @property
    def candidates(self) -> tuple[str, ...]:
        return (LOADED_OPTIMIZED,) if self.kind == LOADED else (BERT_OPTIMIZED, PATCHED)

    @property
    def baselines(self) -> tuple[str, ...]:
        return (LOADED,) if self.kind == LOADED else (*TORCH_PEERS, *ENGINE_PEERS)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`.

    Raises:
        ValueError: there is none.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text())
        return Checkpoint(folder.resolve(), config["model_type"], int(config["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--checkpoint {folder}: no checkpoint of an encoder: {reason}") from None
