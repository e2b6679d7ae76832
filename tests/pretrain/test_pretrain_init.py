"""--init-from: the first weights of a run from a checkpoint."""

import hashlib
import shutil
import signal
from functools import partial

import pytest
import torch
from pretrain_helpers import files_of, record, run_process
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from hbert.data import load_corpus, load_tokenizer, train_tokenizer
from hbert.data.tokenizer import save_tokenizer
from hbert.pretrain.checkpoint import checkpoints

# One step that changes nothing to speak of.
STILL = {"max_steps": 1, "lr": 1e-12, "muon_lr": 1e-12, "eval_every": None, "log_every": 1, "dropout": 0.0}
EMBEDDING = "hbert.embeddings.word_embeddings.weight"


def write_checkpoint(folder, tokenizer, vocab_size=150, width=32):
    torch.manual_seed(3)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * width}
    BertForMaskedLM(BertConfig(vocab_size=vocab_size, **sizes)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def tokenizer(text):
    return train_tokenizer(load_corpus(text=[text]), 150)


@pytest.fixture
def bert(tmp_path, tokenizer):
    return write_checkpoint(tmp_path / "bert", tokenizer)


def near(one, other):
    return torch.allclose(one, other, atol=1e-9, rtol=0)


def test_all_that_corresponds(pretrain, out, bert, tmp_path):
    assert pretrain(**STILL, out=str(tmp_path / "random"))[0] == 0
    status, _, stderr = pretrain(**STILL, init_from=str(bert))
    assert status == 0, stderr
    theirs, ours = load_file(bert / "model.safetensors"), load_file(out / "model.safetensors")
    random = load_file(tmp_path / "random" / "model.safetensors")
    assert near(ours[EMBEDDING], theirs["bert.embeddings.word_embeddings.weight"])
    pairs = {
        "hbert.layers.0.attention.query.weight": "bert.encoder.layer.0.attention.self.value.weight",
        "hbert.layers.1.attention.out.weight": "bert.encoder.layer.1.attention.output.dense.weight",
        "head.dense.weight": "cls.predictions.transform.dense.weight",
    }
    for name, other in pairs.items():
        assert near(ours[name], theirs[other])
    init = record(out)["init"]
    scorer = "hbert.layers.0.attention.query_att.weight"
    assert scorer in init["fresh"] and near(ours[scorer], random[scorer])
    digest = hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    assert (init["from"], init["parts"]) == (str(bert), "all") and init["sha256"] == {"model.safetensors": digest}
    assert f"first weights from {bert} (all): {init['parameters']:,} parameters" in stderr
    assert record(tmp_path / "random")["init"] is None


def test_the_token_embedding_alone(pretrain, out, bert, tmp_path):
    assert pretrain(**STILL, out=str(tmp_path / "random"))[0] == 0
    assert pretrain(**STILL, init_from=str(bert), init_parts="embeddings")[0] == 0
    theirs, ours = load_file(bert / "model.safetensors"), load_file(out / "model.safetensors")
    random = load_file(tmp_path / "random" / "model.safetensors")
    assert near(ours.pop(EMBEDDING), theirs["bert.embeddings.word_embeddings.weight"])
    assert all(near(t, random[name]) for name, t in ours.items())
    init = record(out)["init"]
    assert init["parts"] == "embeddings" and list(init["moved"]) == [EMBEDDING]
    assert init["parameters"] == 150 * 32
    card = (out / "README.md").read_text()
    assert f"| first weights | embeddings (4,800 parameters) of {bert.name}, model.safetensors " in card


def test_the_tokenizer_is_that_of_the_weights(pretrain, out, bert, tokenizer):
    # Another order of the same pieces: what a tokenizer trained here would not have.
    path = bert / "tokenizer.json"
    path.write_text(path.read_text().replace('"quick"', '"@"').replace('"fox"', '"quick"').replace('"@"', '"fox"'))
    assert load_tokenizer(bert).get_vocab() != tokenizer.get_vocab()
    assert pretrain(**STILL, init_from=str(bert))[0] == 0
    assert load_tokenizer(out).get_vocab() == load_tokenizer(bert).get_vocab()


def test_killed_and_resumed_without_the_weights(words, out, tmp_path, bert):
    changes = {"init_from": str(bert)}
    die_at = ("hbert.pretrain.engine", "Engine._seed_dropout", 8, signal.SIGKILL)
    assert run_process(words(**changes), tmp_path / "killed.log", die_at=die_at)[0] == -signal.SIGKILL
    assert checkpoints(out)[-1].name == "step-00000006"
    status, output = run_process(words(**changes, out=str(tmp_path / "whole")), tmp_path / "whole.log")
    assert status == 0, output
    (bert / "model.safetensors").unlink()
    moved = bert.rename(tmp_path / "moved")
    status, output = run_process(words(init_from=str(moved), resume=True), tmp_path / "resumed.log")
    assert status == 0 and "first weights" not in output, output
    ours, whole = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole"))
    assert ours == whole
    assert record(out)["init"] == record(tmp_path / "whole")["init"]


def test_resumed_without_the_checkpoint(pretrain, out, bert):
    assert pretrain(**STILL, init_from=str(bert))[0] == 0
    weights = (out / "model.safetensors").read_bytes()
    # First the tokenizer goes, then all of it.
    for gone in (bert / "tokenizer.json").unlink, partial(shutil.rmtree, bert):
        gone()
        status, _, stderr = pretrain(**STILL, init_from=str(bert), resume=True)
        assert status == 0, stderr
        assert (out / "model.safetensors").read_bytes() == weights
    status, _, stderr = pretrain(**STILL, init_from=str(bert), tokenizer="nowhere", resume=True)
    assert status == 2 and "no tokenizer at nowhere" in stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "2x64x2"}, "the checkpoint does not fit: its hidden_size is 32, the model's is 64"),
        ({"set": ["vocab_size=200"]}, "the checkpoint does not fit: its vocab_size is 150, the model's is 200"),
        ({"arch": "bert"}, "--init-from needs a model of ours, which arch bert is not"),
        ({"init_from": "nowhere"}, "no such folder: nowhere"),
        ({"init_from": None, "init_parts": "all"}, "--init-parts goes with --init-from"),
    ],
)
def test_mistakes(pretrain, out, bert, changes, message):
    status, _, stderr = pretrain(**{"init_from": str(bert), **changes})
    assert status == 2 and message in stderr
    assert not out.exists() or not files_of(out)


def test_another_vocabulary_of_the_same_size(pretrain, out, bert, tmp_path, tokenizer):
    other = tmp_path / "other"
    save_tokenizer(tokenizer, other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"quick"', '"@"'))
    status, _, stderr = pretrain(init_from=str(bert), tokenizer=str(other))
    assert status == 2 and f"the vocabulary of {other} is not that of the weights in {bert}" in stderr
    assert not files_of(out)
    status, _, stderr = pretrain(**STILL, init_from=str(bert), tokenizer=str(bert / "tokenizer.json"))
    assert status == 0, stderr


def test_weights_without_a_tokenizer(pretrain, out, bert):
    (bert / "tokenizer.json").unlink()
    status, _, stderr = pretrain(init_from=str(bert))
    assert status == 2 and "no tokenizer at" in stderr and not files_of(out)


def test_another_start_is_another_run(pretrain, out, bert, tmp_path):
    assert pretrain(**STILL, init_from=str(bert))[0] == 0
    status, _, stderr = pretrain(**STILL, init_from=str(bert), init_parts="embeddings", resume=True)
    assert status == 2 and "init_parts (was 'all', now 'embeddings')" in stderr
