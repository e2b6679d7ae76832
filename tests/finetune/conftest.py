"""Small checkpoints with a tokenizer, and a task that a small model can learn."""

import json
import shutil

import pytest
import torch
from finetune_helpers import bert, hbert_model, save_checkpoint, toy_rows, write_tsv
from safetensors.torch import load_file, save_file

from hbert import cli


@pytest.fixture(autouse=True)
def one_thread(reproducible_and_poisoned):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="session")
def hbert_folder(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(hbert_model(), tmp_path_factory.mktemp("hbert"))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(bert(), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def foreign_weights(hbert_folder, bert_folder, tmp_path_factory):
    """A checkpoint with the weights of another architecture."""
    folder = shutil.copytree(hbert_folder, tmp_path_factory.mktemp("foreign") / "model")
    shutil.copy(bert_folder / "model.safetensors", folder)
    return folder


@pytest.fixture(scope="session")
def partial_weights(hbert_folder, tmp_path_factory):
    """A checkpoint without the weights of its second layer."""
    folder = shutil.copytree(hbert_folder, tmp_path_factory.mktemp("partial") / "model")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def surplus_weights(hbert_folder, tmp_path_factory):
    """A checkpoint whose configuration has fewer norms than its weights."""
    folder = shutil.copytree(hbert_folder, tmp_path_factory.mktemp("surplus") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_style": "post_ln"}))
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Flags of three headerless TSV files: the label follows from one word of the text."""
    folder = tmp_path_factory.mktemp("toy")
    flags = ["--columns", "label", "text"]
    for number, (split, count) in enumerate({"train": 960, "valid": 96, "test": 120}.items()):
        flags += [f"--{split}", write_tsv(folder / f"{split}.tsv", toy_rows(count, seed=number))]
    return flags


@pytest.fixture
def hbert(capsys):
    """Runs a command line and returns its exit status and what it wrote to stdout and stderr."""

    def run(*words):
        status = cli.main([str(word) for word in words])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run
