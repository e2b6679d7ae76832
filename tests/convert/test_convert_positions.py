"""Longer inputs than a checkpoint has positions: by an explicit word only, and by the documented formulas."""

import json
import math

import numpy as np
import pytest
import torch
from convert_helpers import LENGTH, VOCAB, WIDTH, small, small_target
from transformers import AutoTokenizer

from hbert import HBertConfig, HBertModel, cli
from hbert.convert import from_pretrained, read_source, transfer

LONG = 60


def stretched(table, length):
    """NumPy's own interpolation, column by column."""
    table = table.detach().double().numpy()
    places = np.linspace(0, len(table) - 1, length)
    return np.stack([np.interp(places, range(len(table)), column) for column in table.T], axis=1)


def sinusoids(table, length):
    """Number by number."""
    size = math.sqrt(sum(x**2 for x in table.flatten().tolist()) / table.numel())
    angles = [[p / 10000 ** (2 * (c // 2) / WIDTH) for c in range(WIDTH)] for p in range(length)]
    plain = np.array([[math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(row)] for row in angles])
    return plain * size / math.sqrt((plain**2).mean())


FORMULAS = {"interpolate": stretched, "sinusoidal": sinusoids}
NOTES = {
    "interpolate": f"interpolated from {LENGTH} rows",
    "sinusoidal": f"sinusoids of the RMS of {LENGTH} learned rows",
}


def own_positions(family, model):
    """The rows of its table that stand for tokens."""
    table = model.base_model.embeddings.position_embeddings.weight
    return table[2:] if family == "roberta" else table


@pytest.mark.parametrize("way", FORMULAS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_the_formula(family, way):
    theirs = small(family, masked_lm=True)
    ours, report = from_pretrained(theirs, max_positions=LONG, extend_positions=way)
    table = ours.hbert.embeddings.position_embeddings.weight
    expected = FORMULAS[way](own_positions(family, theirs), LONG)
    assert table.shape == (LONG, WIDTH) and np.abs(table.detach().numpy() - expected).max() < 1e-6
    assert ours.config.max_position_embeddings == LONG and ours.config.positions == "learned"
    assert report.moved["hbert.embeddings.position_embeddings.weight"].note == NOTES[way]
    assert NOTES[way] in str(report) and not report.fresh
    with torch.no_grad():
        assert ours(torch.randint(2, VOCAB, (1, LONG))).logits.isfinite().all()


def test_interpolation_keeps_the_ends_and_the_rows_between_at_whole_steps():
    theirs = small("bert")
    ours, _ = from_pretrained(theirs, max_positions=2 * LENGTH - 1, extend_positions="interpolate")
    assert torch.equal(ours.embeddings.position_embeddings.weight[::2], own_positions("bert", theirs))


@pytest.mark.parametrize("way", FORMULAS)
def test_a_hybrid_without_token_types(way):
    theirs = small("bert")
    target = small_target(type_vocab_size=0, max_position_embeddings=LONG)
    ours, report = from_pretrained(theirs, target, extend_positions=way)
    expected = FORMULAS[way](own_positions("bert", theirs), LONG)
    expected = expected + theirs.embeddings.token_type_embeddings.weight[0].detach().numpy()
    assert np.abs(ours.embeddings.position_embeddings.weight.detach().numpy() - expected).max() < 1e-6
    note = f"{NOTES[way]}, with token type 0 in every row"
    assert report.moved["embeddings.position_embeddings.weight"].note == note


def test_without_a_word_nothing_is_made_up():
    name = "embeddings.position_embeddings.weight"
    report = transfer(read_source(small("bert")), HBertModel(small_target(max_position_embeddings=LONG)))
    assert report.fresh[name] == f"{LENGTH} x {WIDTH} in the checkpoint, {LONG} x {WIDTH} here"
    shorter, _ = from_pretrained(small("bert"), max_positions=5)
    assert torch.equal(shorter.get_parameter(name), own_positions("bert", small("bert"))[:5])


def test_our_own_sinusoidal_positions_need_no_word():
    config = small_target(positions="sinusoidal", layer_types="SS", norm_style="sub_ln", num_hidden_layers=2)
    ours, _ = from_pretrained(HBertModel(config), max_positions=LONG)
    assert ours.embeddings.position_table.shape == (LONG, WIDTH)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"max_positions": LONG}, "has 24 learned positions; how shall they become 60. allowed: interp"),
        ({"max_position_embeddings": LONG}, {}, "has 24 learned positions; how shall they become 60"),
        ({}, {"max_positions": 0}, "must be a positive integer, got 0"),
        ({}, {"max_positions": LONG, "extend_positions": "rope"}, "unknown extension of positions 'rope'"),
        ({}, {"max_positions": LENGTH, "extend_positions": "interpolate"}, "24 positions, the model 24"),
        ({}, {"extend_positions": "interpolate"}, "nothing to extend"),
        (
            {"positions": "sinusoidal", "max_position_embeddings": LONG},
            {"extend_positions": "interpolate"},
            "only learned positions are extended; the model's are sinusoidal",
        ),
    ],
)  # fmt: skip
def test_bad_wishes(model, options, message):
    target = small_target(**model) if model else None
    with pytest.raises(ValueError, match=message):
        from_pretrained(small("bert"), target, **options)


def test_a_sinusoidal_checkpoint_has_nothing_to_extend():
    ours = HBertModel(HBertConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=3, layer_types="S"))
    with pytest.raises(ValueError, match="the checkpoint's are sinusoidal"):
        from_pretrained(ours, max_positions=1000, extend_positions="interpolate")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bert"
    small("bert").save_pretrained(folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCAB - 5))]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": LENGTH})
    )
    return folder


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--max-positions", str(LONG), "--extend-positions", "interpolate"]
    assert cli.main(["convert", str(folder), str(out), *words]) == 0
    assert "<-  embeddings.position_embeddings.weight (interpolated from 24 rows)" in capsys.readouterr().out
    ours = HBertModel.from_pretrained(out)
    expected = stretched(own_positions("bert", small("bert")), LONG)
    assert np.abs(ours.embeddings.position_embeddings.weight.detach().numpy() - expected).max() < 1e-6
    # Or it would go on cutting texts to the old length.
    assert AutoTokenizer.from_pretrained(out).model_max_length == LONG


@pytest.mark.parametrize("words", [["--max-positions", f"{LONG}"], ["--set", f"max_position_embeddings={LONG}"]])
def test_the_command_asks_how(folder, tmp_path, capsys, words):
    out = tmp_path / "out"
    assert cli.main(["convert", str(folder), str(out), *words]) != 0
    assert "how shall they become 60? allowed: interpolate, sinusoidal" in capsys.readouterr().err
    assert not out.exists()
