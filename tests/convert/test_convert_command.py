"""`hbert convert` from end to end."""

import json

import pytest
import torch
from convert_helpers import VOCAB, assert_same_function, batch, small
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from hbert import HBertForMaskedLM, cli

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def source(tmp_path):
    """A folder with a masked-LM BERT and the oldest form of a tokenizer."""
    folder = tmp_path / "bert"
    small("bert", masked_lm=True).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES + [f"##{i}" for i in range(VOCAB - len(PIECES))]))
    return folder


@pytest.fixture
def convert(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words):
        status = cli.main(["convert", *map(str, words)])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def test_the_same_encoder(convert, source, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = convert(source, out)
    assert status == 0, stderr
    assert (
        "moved     hbert.layers.{0-2}.ffn.fc1.weight  <-  bert.encoder.layer.{0-2}.intermediate.dense.weight" in stdout
    )
    total = sum(p.numel() for p in HBertForMaskedLM.from_pretrained(out).parameters())
    last = f"HBertForMaskedLM, {total:,} of {total:,} parameters moved: written to {out}"
    assert stdout.splitlines()[-1] == last
    ours = AutoModelForMaskedLM.from_pretrained(out).eval()
    assert_same_function(AutoModelForMaskedLM.from_pretrained(source).eval(), ours, *batch(0))
    theirs, mine = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    assert mine("a b C q")["input_ids"] == theirs("a b C q")["input_ids"]
    assert mine.mask_token_id == 4


def test_a_hybrid_is_the_same_every_time(convert, source, tmp_path):
    words = ["--arch", "v1c", "--set", "num_hidden_layers=4", "hidden_dropout_prob=0"]
    for name in ("one", "two"):
        torch.rand(3)
        status, stdout, stderr = convert(source, tmp_path / name, *words)
        assert status == 0, stderr
    assert "fresh     hbert.layers.{0,2}.attention_norm.conv_weight: nothing in the checkpoint corresponds" in stdout
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    config = AutoModel.from_pretrained(tmp_path / "one").config
    assert config.layer_types == ["linear_attention", "full_attention"] * 2
    assert (config.norm_style, config.conv_kernel_size, config.hidden_dropout_prob) == ("sub_ln", 3, 0)
    assert (config.positions, config.type_vocab_size, config.max_position_embeddings) == ("learned", 2, 24)


def test_fields_alone_keep_the_rest(convert, source, tmp_path):
    status, _, stderr = convert(source, tmp_path / "out", "--set", "norm_style=pre_ln")
    assert status == 0, stderr
    config = AutoModel.from_pretrained(tmp_path / "out").config
    assert config.norm_style == "pre_ln" and config.layer_types == ["full_attention"] * 3


@pytest.mark.parametrize("words", [["--max-positions", 12], ["--set", "max_position_embeddings=12"]])
def test_the_tokenizer_knows_the_positions(convert, source, tmp_path, words):
    status, _, stderr = convert(source, tmp_path / "out", *words)
    assert status == 0, stderr
    assert AutoModel.from_pretrained(tmp_path / "out").config.max_position_embeddings == 12
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 12


def test_without_a_tokenizer(convert, source, tmp_path):
    (source / "vocab.txt").unlink()
    status, stdout, _ = convert(source, tmp_path / "out")
    assert status == 0 and f"no tokenizer: there is none in {source}" in stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_an_empty_folder_is_taken(convert, source, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert(source, tmp_path / "out")[0] == 0


def test_a_folder_that_holds_something_is_refused(convert, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    status, _, stderr = convert(source, out)
    assert status == 2 and stderr == f"hbert: error: {out} is not an empty folder; choose another\n"
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--arch", "bert"],
            "unknown arch 'bert'; allowed: v1, v2, v1c, v2c, additive, additive-c, vanilla, or a letter",
        ),
        (["--arch", "AS"], "layer_types has 2 entries, but num_hidden_layers is 3"),
        (["--set", "norm=post"], "HBertConfig has no field norm"),
        (["--set", "hidden_size=24"], "its hidden_size is 12, the model's is 24"),
        (["--arch", "v1c", "--set", "norm_style=post_ln"], "conv_kernel_size 3 needs a norm before the attention"),
    ],
)
def test_mistakes_write_nothing(convert, source, tmp_path, words, message):
    status, _, stderr = convert(source, tmp_path / "out", *words)
    assert status == 2 and message in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bert"}


def test_a_damaged_tokenizer(convert, source, tmp_path):
    (source / "tokenizer.json").write_text("{")
    status, _, stderr = convert(source, tmp_path / "out")
    assert status == 2 and f"the tokenizer in {source} cannot be read" in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bert"}


def test_minilm(convert, minilm, tmp_path):
    status, stdout, stderr = convert(minilm, tmp_path / "out")
    assert status == 0, stderr
    assert "HBertModel, 22,565,376 of 22,565,376 parameters moved" in stdout
    theirs, mine = AutoTokenizer.from_pretrained(minilm), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Hybrid encoders, naïvely converted."
    assert mine(text)["input_ids"] == theirs(text)["input_ids"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "hbert"
