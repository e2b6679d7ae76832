"""A small corpus of two sources, its tokenizer and tokens; no network."""

import pytest
from evaluate_helpers import VOCAB, write_documents

from hbert.data import TokenCache, load_corpus, train_tokenizer


@pytest.fixture(autouse=True)
def offline_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HBERT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    # The variable is read when huggingface_hub is imported, which another test file may have done.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # rich would style and wrap what the tests read.
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return load_corpus(text=[write_documents(folder / f"{seed}.txt", seed) for seed in (1, 2)])


@pytest.fixture
def text_files(corpus):
    """The files of the corpus, which a test may change or remove."""
    contents = {file.path: file.path.read_bytes() for file in corpus.files}
    yield list(contents)
    for path, content in contents.items():
        path.write_bytes(content)


@pytest.fixture
def tokenizer(corpus):
    return train_tokenizer(corpus, VOCAB)


@pytest.fixture
def cache(corpus, tokenizer):
    return TokenCache.build(corpus, tokenizer)
