"""Bad input of `hbert finetune`: one line that says what is wrong, before anything is trained or written."""

import json
import shutil
import sys

import pytest
from finetune_helpers import PIECES, hbert_model, save_checkpoint, toy_rows, write_tsv
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from hbert.finetune import experiment


@pytest.fixture
def refused(hbert, hbert_folder, tmp_path, monkeypatch):
    """Runs a fine-tuning that must be refused before it trains; returns its message."""
    path = write_tsv(tmp_path / "data.tsv", toy_rows(30, seed=0), header=("label", "text"))
    flags = {"--model": hbert_folder, "--out": tmp_path / "out", "--epochs": 1}
    flags |= {f"--{split}": path for split in ("train", "valid", "test")}

    def no_training(*args, **kwargs):
        raise AssertionError("training has begun")

    monkeypatch.setattr(experiment, "train", no_training)

    def run(*extra, **changes):
        given = flags | {f"--{name}": value for name, value in changes.items()}
        words = [word for name, value in given.items() if value is not None for word in (name, value)]
        before = sorted(tmp_path.rglob("*"))
        status, stdout, stderr = hbert("finetune", *words, *extra)
        assert status == 2 and not stdout and stderr.startswith("hbert: error: ") and stderr.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return stderr

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", 0], "epochs is 0; it must be at least 1"),
        (["--batch-size", -1], "batch_size is -1"),
        (["--patience", 0], "patience is 0"),
        (["--max-length", 0], "max_length is 0"),
        (["--max-length", 2], "max_length is 2; with the special tokens it must be at least 3"),
        (["--max-length", 25], "max_length is 25; the model has 24 positions"),
        (["--lr", 0], "lr is 0.0; it must be above 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--lr", 1e-3, 1e-3], "lr must be one or several different values"),
        (["--seeds", 1, 1], "seeds must be one or several different values"),
        (["--seeds", -1], "seeds are (-1,); they must be in [0, 2^32)"),
        (["--warmup", 1], "warmup is 1.0; it must be in [0, 1)"),
        (["--weight-decay", -0.1], "weight_decay is -0.1"),
        (["--metric", "exact_match"], "allowed for this kind of labels: accuracy, macro_f1, mcc"),
        (["--multi-label", "--label-separator", ""], "label_separator is empty"),
        (["--set", "hidden_dropout"], "--set takes FIELD=VALUE"),
        (["--set", "dropuot=0.1"], "HBertConfig has no field dropuot"),
        (["--set", "classifier_pooling=max"], "classifier_pooling"),
        (["--set", "intermediate_size=48"], "have another shape than its configuration says"),
        (["--label-column", "y"], "has no column 'y'; it has: 'label', 'text' (--label-column chooses one"),
        (["--text-column", "y"], "has no column 'y'"),
        (["--text-pair-column", "y"], "has no column 'y'"),
        (["--columns", "label", "text", "c"], "line 1: 2 cells, but --columns has 3 columns"),
        (["--dataset", "x/y", "--columns", "a", "b"], "not of a data set"),
        (["--dataset", "/no/such/data"], "data set '/no/such/data' cannot be loaded"),
    ],
)
def test_flags(refused, flags, message):
    assert message in refused(*flags)


def test_splits(refused, tmp_path):
    assert "--valid, --test needed" in refused(valid=None, test=None)
    assert "no such file: nothing.tsv" in refused(test="nothing.tsv")
    unknown = write_tsv(tmp_path / "a.tsv", [("good", "a"), ("new", "b")], header=("label", "text"))
    message = "line 3: the label 'new' is not one of the training split: bad, good, odd"
    assert message in refused(test=unknown) and message in refused(valid=unknown)
    empty = write_tsv(tmp_path / "b.tsv", [("good", "a"), ("good", " ")], header=("label", "text"))
    assert "b.tsv, line 3: an empty text" in refused(test=empty)
    alone = write_tsv(tmp_path / "c.tsv", [("good", "a"), ("good", "b")], header=("label", "text"))
    assert "only the label 'good'" in refused(train=alone)


def test_checkpoints(refused, tmp_path, hbert_folder, foreign_weights, partial_weights):
    assert "no such folder: ./nothing" in refused(model="./nothing")
    assert "is not a model folder: it has no config.json" in refused(model=tmp_path)
    assert "config.json is a file; give its folder" in refused(model=hbert_folder / "config.json")
    bare = shutil.copytree(hbert_folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(model=bare)
    assert "weights are incomplete or of another architecture" in refused(model=foreign_weights)
    assert "weights are incomplete" in refused(model=partial_weights)


def test_architectures_without_a_head(refused, tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "vit")
    assert "is a vit model: that has no sequence classification head" in refused(model=tmp_path / "vit")


def test_tokenizers(refused, tmp_path, hbert_folder):
    larger = save_checkpoint(hbert_model(), tmp_path / "larger", [*PIECES, "more"])
    message = "the tokenizer of {!r} has ids up to 25, but the model has 25 token embeddings"
    assert message.format(str(larger)) in refused(model=larger)
    none = shutil.copytree(hbert_folder, tmp_path / "none")
    for path in none.glob("tokenizer*"):
        path.unlink()
    message = "{!r} has no tokenizer: save one into the folder (tokenizer.save_pretrained)"
    assert message.format(str(none)) in refused(model=none)
    config = GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, n_positions=24)
    gpt = save_checkpoint(GPT2LMHeadModel(config), tmp_path / "gpt")
    settings = json.loads((gpt / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (gpt / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no padding token" in refused(model=gpt)


@pytest.mark.parametrize("change", ["norm_style=post_ln", "norm_style=pre_ln", "positions=sinusoidal", "layer_types=A"])
def test_weights_that_the_model_has_no_place_for(refused, change):
    more = ["num_hidden_layers=1"] if change == "layer_types=A" else []
    message = refused("--set", change, *more)
    assert "the weights are incomplete or of another architecture (" in message
    assert "have no place, such as hbert." in message


def test_matplotlib_is_missed_before_training(refused, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("matplotlib."):
            monkeypatch.delitem(sys.modules, name)
    for name in ("confusion", "experiment", "finetune_command"):
        monkeypatch.delitem(sys.modules, f"hbert.finetune.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "this command needs matplotlib, which is not installed: pip install 'hbert[train]'" in refused()


def test_out(refused, tmp_path, hbert_folder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "exists; choose another folder" in refused(out=tmp_path / "mine")
    assert "is not the result of a fine-tuning" in refused("--overwrite", out=tmp_path / "mine")
    assert "exists" in refused(out=tmp_path / "data.tsv")
    earlier = shutil.copytree(hbert_folder, tmp_path / "earlier")
    (earlier / "results.json").write_text("{}")
    assert "is read from it" in refused("--overwrite", out=earlier, model=earlier)
    assert "cannot be written" in refused(out="/proc/nothing/out")
