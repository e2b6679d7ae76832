"""A tokenizer of twenty-odd words, models of two layers, and texts whose label one word decides."""

import json
import random

from transformers import BertConfig, BertForMaskedLM

from hbert import HBertConfig, HBertForMaskedLM
from hbert.data.tokenizer import SPECIAL_TOKENS, save_tokenizer, tokenizer_from_vocabulary

FILLER = "the a of on sea boat wind sails under old stone bridge and then".split()
DECIDES = {"good": ("happy", "bright"), "bad": ("sad", "dark"), "odd": ("strange", "green")}
PIECES = [*SPECIAL_TOKENS, *FILLER, *(word for words in DECIDES.values() for word in words)]
VOCAB, LENGTH = len(PIECES), 24
FAST = ("--epochs", 4, "--lr", 2e-3, "--batch-size", 16, "--dtype", "fp32")


def hbert_model(vocab_size=VOCAB, **fields):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "layer_types": "AS", "positions": "learned"}
    return HBertForMaskedLM(HBertConfig(vocab_size=vocab_size, max_position_embeddings=LENGTH, **{**sizes, **fields}))


def bert(vocab_size=VOCAB):
    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def save_checkpoint(model, folder, pieces=PIECES):
    model.save_pretrained(folder)
    save_tokenizer(tokenizer_from_vocabulary(list(pieces)), folder)
    return folder


def toy_rows(count, seed):
    """(label, text) of texts of 3 to 14 words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(sorted(DECIDES))
        words = rng.choices(FILLER, k=rng.randint(2, 13))
        words.insert(rng.randrange(len(words) + 1), rng.choice(DECIDES[label]))
        rows.append((label, " ".join(words)))
    return rows


def write_tsv(path, rows, header=None):
    lines = ["\t".join(row) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def predictions(path):
    """The cells of a TSV of predictions by column."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: [line[i] for line in lines[1:]] for i, name in enumerate(lines[0])}
