"""Tiny models, a cache of random tokens, and run folders as a training run leaves them."""

import json
import random

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from hbert import HBertConfig, HBertForMaskedLM
from hbert.data.tokenizer import tokenizer_digest

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven small boats sail under bridges of stone and "
    "nobody knows whether winter will bring snow or only rain to valley where old farmers sing"
).split()
VOCAB = 300


def write_documents(path, seed, count=300):
    """Random sentences, a blank line between documents."""
    rng = random.Random(seed)
    documents = [
        "\n".join(" ".join(rng.choices(WORDS, k=rng.randint(5, 30))) for _ in range(rng.randint(2, 6)))
        for _ in range(count)
    ]
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def _spread(model):
    """Weights large enough for the logits to differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def hbert_model(vocab_size=VOCAB, **fields):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "layer_types": "AS", "max_position_embeddings": 64}
    return _spread(HBertForMaskedLM(HBertConfig(vocab_size=vocab_size, **{**sizes, **fields})))


def bert_model(vocab_size=VOCAB):
    torch.manual_seed(2)
    return _spread(
        BertForMaskedLM(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        )
    )


def masked_by_definition(cache, name, length, index, seed, rate):
    """Input ids and labels of one held-out block, asked of the data part directly."""
    import hashlib

    from hbert.data import mask_tokens

    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    first, last = cache.held_out.spans[name]
    start, end = cache.held_out.offsets[[first, last]]
    ids = np.asarray(cache.held_out.tokens[start:end], dtype=np.int64)
    return mask_tokens(
        ids[index * length : (index + 1) * length],
        np.random.default_rng((seed, digest, index)),
        mask_id=cache.mask_id,
        vocab_size=cache.vocab_size,
        special_ids=cache.special_ids.values(),
        rate=rate,
    )


def run_info(corpus, tokenizer, max_steps=100, step_seconds=0.5, **entries):
    """The entries of a run.json that are read."""
    settings = {"arch": "v1c", "size": "tiny", "seed": 0, "budget": 50.0, "recipe_corpus": None}
    return {
        "status": "finished",
        "settings": settings | {"data": [str(file.path) for file in corpus.files]},
        "parameters": {"total": 1_234_567, "token_embedding": 345},
        "max_steps": max_steps,
        "step_seconds": step_seconds,
        "plan": {"calibration": None},
        "eval": {"rate": 0.15, "blocks": 1024, "length": 32},
        "corpus": {"fingerprint": corpus.fingerprint},
        "tokenizer": {"sha256": tokenizer_digest(tokenizer)},
        "token_cache": "/nowhere",
        **entries,
    }


def write_run(folder, settings, metrics):
    """A run folder: run.json and one JSON line for each entry of ``metrics``."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder
