"""Initialization: what each parameter is drawn from, also after loading on the meta device."""

from __future__ import annotations

import math

import pytest
import torch
from model_helpers import small_config
from safetensors.torch import load_file, save_file

from hbert import (
    HBertConfig,
    HBertForMaskedLM,
    HBertForQuestionAnswering,
    HBertForSequenceClassification,
    HBertForTokenClassification,
    HBertModel,
)

WIDE = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 997, "layer_types": "AS"}


def built(kind=HBertForMaskedLM, **fields):
    torch.manual_seed(0)
    return kind(HBertConfig(**{**WIDE, **fields}))


def assert_normal(name: str, weight: torch.Tensor, std: float) -> None:
    """Mean 0 and the deviation within five standard errors, and not uniform (kurtosis 3 against 1.8)."""
    weight, n = weight.detach(), weight.numel()
    assert abs(float(weight.mean())) < 5 * std / math.sqrt(n), name
    assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * n), name
    if n > 5000:
        assert 2.6 < float((weight / weight.std()).pow(4).mean()) < 3.4, name


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (HBertForMaskedLM, {"conv_kernel_size": 3}),
        (HBertForMaskedLM, {"norm_style": "merge", "positions": "learned", "type_vocab_size": 2}),
        (HBertForMaskedLM, {"tie_word_embeddings": False}),
        (HBertForSequenceClassification, {}),
        (HBertForTokenClassification, {}),
        (HBertForQuestionAnswering, {}),
    ],
    ids=["conv", "merge-learned", "untied", "sequences", "tokens", "answers"],
)
def test_normal_init_covers_every_parameter(kind, fields):
    model = built(kind, scorer="per_head", initializer_range=0.05, **fields)
    seen = set()
    for name, p in model.named_parameters():
        kind = name.rsplit(".", 1)[1]
        if name.endswith("norm.weight"):
            assert torch.equal(p, torch.ones_like(p)), name
        elif kind == "bias":
            assert not p.any(), name
        elif kind == "conv_weight":
            assert p.abs().max() <= 3**-0.5 and abs(float(p.std()) - 1 / 3) < 0.03, name
        else:
            rows = p[1:] if name.endswith("word_embeddings.weight") else p
            assert_normal(name, rows, 0.05)
        seen.add(kind)
    assert seen == {"weight", "bias", *(["conv_weight"] if "conv_kernel_size" in fields else [])}
    assert not model.get_input_embeddings().weight[0].any()


def test_the_middle_tap_of_a_convolution_branch_acts_as_drawn():
    model = built(layer_types="S", conv_kernel_size=3, conv_placement="branch")
    taps = model.hbert.layers[0].conv.conv_weight.detach().clone()
    taps[1] += 1
    assert taps.abs().max() <= 3**-0.5 and abs(float(taps.std()) - 1 / 3) < 0.03


def test_magneto_gains():
    model = built(init="magneto", num_hidden_layers=2)
    gain, hidden = math.sqrt(math.log(4)), 256
    square = math.sqrt(2 / (2 * hidden))
    feed_forward = gain * math.sqrt(2 / (5 * hidden))
    additive, self_attention = (layer.attention for layer in model.hbert.layers)
    query, key, value = self_attention.qkv.weight.chunk(3)
    assert_normal("S query", query, square)
    assert_normal("S key", key, square)
    assert_normal("S value", value, gain * square)
    assert_normal("S out", self_attention.out.weight, gain * square)
    assert_normal("A query", additive.query.weight, square)
    assert_normal("A key", additive.key.weight, square)
    assert_normal("A transform", additive.transform.weight, gain * square)
    assert_normal("A scorer", additive.query_att.weight, 0.02)
    for layer in model.hbert.layers:
        assert_normal("fc1", layer.ffn.fc1.weight, feed_forward)
        assert_normal("fc2", layer.ffn.fc2.weight, feed_forward)
    assert_normal("embeddings", model.get_input_embeddings().weight[1:], 0.02)
    assert_normal("head", model.head.dense.weight, 0.02)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("style", ["post_ln", "merge"])
def test_magneto_gains_without_inner_norms(style):
    model = built(init="magneto", norm_style=style)
    gain = math.sqrt(math.log(4))
    assert_normal("fc1", model.hbert.layers[0].ffn.fc1.weight, gain * math.sqrt(2 / (5 * 256)))
    if style == "merge":
        assert_normal("merge", model.hbert.layers[0].merge.out.weight, gain * math.sqrt(2 / (3 * 256)))


@pytest.mark.parametrize("init", ["normal", "magneto"])
def test_what_a_checkpoint_lacks_is_drawn_and_what_it_has_is_kept(tmp_path, monkeypatch, init):
    config = small_config(init=init, layer_types="AAS", scorer="per_head", conv_kernel_size=3)
    original = HBertForMaskedLM(config)
    original.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    given = {name: t + 1 for name, t in load_file(path).items() if ".layers.2." in name}
    save_file(given, path, metadata={"format": "pt"})

    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    loaded = HBertForMaskedLM.from_pretrained(tmp_path)

    weights = dict(loaded.named_parameters())
    assert all(t.isfinite().all() for t in (*weights.values(), *loaded.buffers()))
    assert all(torch.equal(weights[name], t) for name, t in given.items())
    drawn = weights["hbert.layers.0.attention.query.weight"]
    expected = 0.02 if init == "normal" else 12**-0.5
    assert 0.7 < float(drawn.std()) / expected < 1.3
    assert torch.equal(weights["hbert.layers.0.ffn.norm.weight"], torch.ones(20))


def poisoned(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t


def test_the_position_table_is_rebuilt_and_not_saved(tmp_path):
    model = HBertModel(small_config())
    table = model.embeddings.position_table
    assert "embeddings.position_table" not in model.state_dict()
    assert table[3, 4] == pytest.approx(math.sin(3 / 10000 ** (4 / 12)), abs=1e-7)
    assert table[3, 5] == pytest.approx(math.cos(3 / 10000 ** (4 / 12)), abs=1e-7)
    model.save_pretrained(tmp_path)
    assert torch.equal(HBertModel.from_pretrained(tmp_path).embeddings.position_table, table)


def test_odd_widths_have_a_position_table():
    config = small_config(hidden_size=7, num_attention_heads=1)
    assert HBertModel(config).embeddings.position_table.shape == (48, 7)
