"""The examples as modules, and what they are given: checkpoints of two layers, a small task, a small text."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
sys.path += [str(TESTS / "finetune"), str(TESTS / "pretrain")]

from finetune_helpers import bert, save_checkpoint, toy_rows, write_tsv  # noqa: E402
from pretrain_helpers import write_corpus  # noqa: E402


@pytest.fixture(autouse=True)
def alone(reproducible_and_poisoned, monkeypatch, tmp_path):
    """One thread, a cache and a working folder of its own, no network."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    for name, value in {"HBERT_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def load(monkeypatch):
    """Imports an example."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run(load, monkeypatch, capsys):
    """Runs an example with these arguments and returns what it printed."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            assert load(name).main() in (0, None)
        except SystemExit as exit:
            assert exit.code == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def bert_checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(bert(), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder of train.tsv, valid.tsv and test.tsv."""
    folder = tmp_path_factory.mktemp("task")
    for seed, (split, count) in enumerate({"train": 48, "valid": 16, "test": 16}.items()):
        write_tsv(folder / f"{split}.tsv", toy_rows(count, seed))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "text.txt", documents=120)
