"""Every test of the text part has an empty cache of its own and no network."""

import random

import pytest
from data_helpers import WORDS, write_text

from hbert.data import load_corpus, train_tokenizer


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("HBERT_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache


@pytest.fixture
def corpus(tmp_path):
    """400 documents of random sentences, in two files."""
    rng = random.Random(0)
    documents = [
        [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(rng.randint(1, 4))] for _ in range(400)
    ]
    paths = [
        write_text(tmp_path / name, part) for name, part in (("a.txt", documents[:250]), ("b.txt", documents[250:]))
    ]
    return load_corpus(text=paths)


@pytest.fixture
def tokenizer(corpus):
    return train_tokenizer(corpus, 300)
