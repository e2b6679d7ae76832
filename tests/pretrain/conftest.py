"""All tests of pretraining share one cache and one text, and have no network."""

import os

import pytest
from pretrain_helpers import SMALL, flags, write_corpus

from hbert import cli
from hbert.data import TokenCache, load_corpus, train_tokenizer


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    # Also read by the processes that tests start.
    before = {name: os.environ.get(name) for name in ("HBERT_CACHE", "PIP_NO_INDEX", "HF_HUB_OFFLINE")}
    os.environ.update(HBERT_CACHE=str(folder / "cache"), PIP_NO_INDEX="1", HF_HUB_OFFLINE="1")
    yield folder
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def text(shared):
    return write_corpus(shared / "text.txt")


@pytest.fixture(scope="session")
def cache(text):
    corpus = load_corpus(text=[text])
    return TokenCache.build(corpus, train_tokenizer(corpus, SMALL["vocab_size"]))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def words(text, out):
    """The command line of a small run, with these options in place of its own; None leaves one out."""

    def build(**changes):
        options = {"data": str(text), "out": str(out), **SMALL, **changes}
        return flags(**{name: value for name, value in options.items() if value is not None})

    return build


@pytest.fixture
def pretrain(words, capsys):
    """Runs the command here and returns (exit status, stdout, stderr)."""

    def run(**changes):
        try:
            status = cli.main(["pretrain", *words(**changes)])
        except SystemExit as exit:
            status = exit.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def finished(pretrain, out):
    status, stdout, stderr = pretrain()
    assert status == 0, stderr
    return out, stdout, stderr
