"""CTranslate2: its encoder, which gets the lengths and computes the padding up to the longest sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import ctranslate2
import numpy as np

from bench.engines.engine import Forward, Graphs, Variants


def variants(peer: str, graphs: Graphs, cpus: list[int]) -> Variants:
    """One for each way of computing beside the int8 products."""
    return {name: partial(_Encoder, path, len(cpus)) for name, path in graphs.items()}


class _Encoder:
    def __init__(self, path: str, threads: int) -> None:
        self._encoder = ctranslate2.Encoder(
            path, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )

    def prepared(self, ids: Any, mask: Any) -> Forward:
        tokens, lengths = (
            ctranslate2.StorageView.from_array(np.ascontiguousarray(values, np.int32)) for values in (ids, mask.sum(1))
        )
        return lambda: np.asarray(self._encoder.forward_batch(tokens, lengths).last_hidden_state)
