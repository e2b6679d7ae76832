"""Batches of real text for the training suite, made once by the coordinator so that all peers get the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Case

SOURCE = "wiki_vital"
VOCAB_SIZE = 30522
BATCHES = 8
MASK_RATE = 0.15
SEED = 0


def masked_batches(case: Case, folder: Path) -> dict[str, Any]:
    """Writes `BATCHES` masked batches (input_ids and labels, int64 [BATCHES, batch, seq]) and returns their path.

    Blocks of `SOURCE`, full to the last token, drawn and masked by a fixed seed. The first call on a machine fetches
    the text and trains the vocabulary; later ones find both in hbert's cache.
    """
    from hbert.data import MaskedBatches, TokenCache, load_corpus, train_tokenizer

    corpus = load_corpus([SOURCE])
    cache = TokenCache.build(corpus, train_tokenizer(corpus, VOCAB_SIZE))
    stream = MaskedBatches(cache, cache.train.blocks(case.seq), case.batch, seed=SEED, rate=MASK_RATE)
    batches = [stream[step] for step in range(BATCHES)]
    path = folder / f"{case.batch}x{case.seq}.npz"
    np.savez(
        path,
        input_ids=np.stack([batch.input_ids for batch in batches]),
        labels=np.stack([batch.labels for batch in batches]),
    )
    return {"batches": str(path)}
