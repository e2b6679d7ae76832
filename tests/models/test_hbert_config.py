"""HBertConfig: presets, layer patterns, errors, and the round trip through JSON."""

from __future__ import annotations

import pytest
import torch
from model_helpers import batch, small_config, small_model
from transformers import AutoConfig, AutoModel

import hbert.config
from hbert import HBertConfig, HBertForMaskedLM, HBertForSequenceClassification, HBertModel

LETTER_OF = {"linear_attention": "A", "full_attention": "S"}


def letters(config: HBertConfig) -> str:
    return "".join(LETTER_OF[name] for name in config.layer_types)


@pytest.mark.parametrize(
    ("preset", "pattern", "conv"),
    [
        ("v1", "ASASASASASAS", 0),
        ("v2", "AASAASAASAAS", 0),
        ("additive", "A" * 12, 0),
        ("vanilla", "S" * 12, 0),
        ("v1c", "ASASASASASAS", 3),
        ("v2c", "AASAASAASAAS", 3),
        ("additive_c", "A" * 12, 3),
    ],
)
def test_presets(preset, pattern, conv):
    config = getattr(HBertConfig, preset)()
    assert letters(config) == pattern and config.conv_kernel_size == conv
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (768, 12, 3072)
    assert (config.norm_style, config.hidden_act, config.positions) == ("sub_ln", "gelu", "sinusoidal")
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "heads"),
    [("tiny", 2, 128, 2), ("mini", 6, 256, 4), ("small", 6, 384, 6), ("base", 12, 768, 12)],
)
def test_sizes(size, layers, hidden, heads):
    config = HBertConfig.v2(size)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, hidden, heads)
    assert config.intermediate_size == 4 * hidden and letters(config) == ("AAS" * 4)[:layers]


def test_preset_fields_override_and_the_pattern_is_cut_to_the_depth():
    config = HBertConfig.v2c("tiny", num_hidden_layers=5, conv_kernel_size=5, norm_style="pre_ln")
    assert letters(config) == "AASAA" and config.conv_kernel_size == 5 and config.norm_style == "pre_ln"


def test_layer_types_as_letters_or_names_and_the_default_is_v1():
    assert HBertConfig(layer_types="AASAAS").layer_types == HBertConfig.v2(num_hidden_layers=6).layer_types
    assert letters(HBertConfig(layer_types=["full_attention", "linear_attention"])) == "SA"
    assert letters(HBertConfig()) == "AS" * 6 and letters(HBertConfig(num_hidden_layers=3)) == "ASA"


@pytest.mark.parametrize(("preset", "count"), [("v1", 120_281_802), ("v2", 119_137_530), ("additive", 116_848_986)])
def test_parameter_counts_of_the_authors_checkpoints(preset, count):
    config = getattr(HBertConfig, preset)(norm_style="merge", hidden_act="relu")
    with torch.device("meta"):
        model = HBertForMaskedLM(config)
    model.tie_weights()  # early 5.x releases leave it out on the meta device
    # The authors' checkpoints store the sinusoidal table; here it is a buffer that is rebuilt.
    assert sum(t.numel() for t in (*model.parameters(), *model.buffers())) == count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_style": "rms"}, "norm_style is 'rms'; allowed: 'sub_ln', 'post_ln', 'pre_ln', 'merge'"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; allowed: 'gelu', 'gelu_tanh', 'relu'"),
        ({"positions": "rotary"}, "positions is 'rotary'; allowed: 'sinusoidal', 'learned'"),
        ({"init": "xavier"}, "init is 'xavier'; allowed: 'normal', 'magneto'"),
        ({"scorer": "mlp"}, "scorer is 'mlp'; allowed: 'dense', 'per_head'"),
        ({"conv_kernel_size": 4}, "conv_kernel_size is 4; allowed: 0, 3, 5"),
        ({"conv_kernel_size": 3.0}, "conv_kernel_size must be an integer of at least 0, got 3.0"),
        ({"conv_kernel_size": False}, "conv_kernel_size must be an integer of at least 0, got False"),
        ({"conv_placement": "output"}, "conv_placement is 'output'; allowed: 'input', 'branch'"),
        ({"conv_kernel_size": 3, "norm_style": "post_ln"}, "needs a norm before the attention"),
        ({"conv_kernel_size": 3, "norm_style": "merge"}, "needs a norm before the attention"),
        ({"layer_types": "ABS"}, "layer_types has 'B'; allowed: A or 'linear_attention', S or 'full_attention'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"layer_types": ""}, "layer_types has no layers"),
        ({"layer_types": "AS", "num_hidden_layers": 3}, "has 2 entries, but num_hidden_layers is 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        ({"hidden_size": 100}, "hidden_size 100 is not divisible by num_attention_heads 12"),
        ({"hidden_size": 96.0}, "hidden_size must be an integer of at least 1"),
        ({"hidden_size": None}, "hidden_size must be an integer of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer of at least 1"),
        ({"intermediate_size": -1}, "intermediate_size must be an integer of at least 1"),
        ({"vocab_size": True}, "vocab_size must be an integer of at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be an integer of at least 1"),
        ({"type_vocab_size": -1}, "type_vocab_size must be an integer of at least 0"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be a probability in \[0, 1\)"),
        ({"attention_probs_dropout_prob": None}, "attention_probs_dropout_prob must be a probability"),
        ({"classifier_dropout": -0.1}, "classifier_dropout must be a probability"),
        ({"initializer_range": 0}, r"initializer_range must be a number in \(0, 1\)"),
        ({"layer_norm_eps": "1e-5"}, r"layer_norm_eps must be a number in \(0, 1\)"),
        ({"tie_word_embeddings": "False"}, "tie_word_embeddings must be True or False, got 'False'"),
        ({"pad_token_id": 30522}, r"pad_token_id must be None or in \[0, 30522\)"),
    ],
)
def test_bad_values_say_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        HBertConfig(**fields)


def test_bad_presets():
    with pytest.raises(ValueError, match="unknown size 'large'; allowed: tiny, mini, small, base"):
        HBertConfig.v1("large")
    with pytest.raises(ValueError, match="a preset decides layer_types"):
        HBertConfig.v1(layer_types="A")
    with pytest.raises(TypeError, match="no field conv_kernel"):
        HBertConfig.v1("tiny", conv_kernel=3)
    with pytest.raises(ValueError, match="num_hidden_layers must be an integer"):
        HBertConfig.v1(num_hidden_layers=2.0)


def test_fields_of_transformers_pass_through_presets():
    config = HBertConfig.v1("tiny", num_labels=5, attn_implementation="eager")
    assert config.num_labels == 5 and config._attn_implementation == "eager"


@pytest.mark.parametrize("preset", ["v1c", "vanilla"])
def test_round_trip(tmp_path, preset):
    config = getattr(HBertConfig, preset)("tiny", scorer="per_head", pad_token_id=None, classifier_dropout=0.1)
    config.save_pretrained(tmp_path)
    assert HBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HBertConfig and loaded.layer_types == config.layer_types


def test_loading_a_bad_configuration_fails(tmp_path):
    small_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"sub_ln"', '"subln"'))
    with pytest.raises(ValueError, match="norm_style is 'subln'"):
        HBertConfig.from_pretrained(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Four layers, ASSA."""
    small_model(HBertForMaskedLM, dtype=torch.float32, layer_types="ASSA").save_pretrained(tmp_path)
    return tmp_path


LOADERS = [HBertConfig.from_pretrained, AutoConfig.from_pretrained, AutoModel.from_pretrained]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_style": "subln"}, "norm_style is 'subln'; allowed"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'; allowed"),
        ({"layer_types": "ASB"}, "layer_types has 'B'"),
        ({"layer_types": "AS", "num_hidden_layers": 4}, "has 2 entries, but num_hidden_layers is 4"),
        ({"layer_types": "AS", "num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": 5}, "has 4 entries, but num_hidden_layers is 5"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be an integer of at least 1, got 2.0"),
    ],
)
def test_fields_given_when_loading_are_checked(folder, load, fields, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **fields)


@pytest.mark.parametrize("load", LOADERS[:2])
def test_fields_given_when_loading_take_the_place_of_the_folders(folder, load):
    config, unused = load(folder, layer_types="SA", num_hidden_layers=2, num_labels=5, no=1, return_unused_kwargs=True)
    assert letters(config) == "SA" and config.num_hidden_layers == 2 and config.num_labels == 5
    assert config.layer_types == ["full_attention", "linear_attention"] and unused == {"no": 1}
    assert letters(load(folder, layer_types="AAA", num_hidden_layers=None)) == "AAA"


def test_fewer_layers_are_the_first_ones(folder, tmp_path):
    whole, part = (HBertForMaskedLM.from_pretrained(folder, **fields) for fields in ({}, {"num_hidden_layers": 2}))
    assert letters(part.config) == "AS" and len(part.hbert.layers) == part.config.num_hidden_layers == 2
    assert torch.equal(part.hbert.layers[1].ffn.fc2.weight, whole.hbert.layers[1].ffn.fc2.weight)
    part.save_pretrained(tmp_path / "part")
    again = HBertForMaskedLM.from_pretrained(tmp_path / "part")
    assert torch.equal(again(*batch()).logits, part(*batch()).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 1}, "has 2 entries, but num_hidden_layers is 1"),
        ({"layer_types": "AA"}, r"layer_types is 'AA'; set \['linear_attention', 'linear_attention'\]"),
        ({"norm_style": "subln"}, "norm_style is 'subln'"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'"),
        ({"hidden_size": 13}, "hidden_size 13 is not divisible by num_attention_heads 3"),
    ],
)
@pytest.mark.parametrize("kind", [HBertModel, HBertForSequenceClassification])
def test_no_model_is_made_of_fields_that_were_set_wrong(kind, fields, message):
    config = small_config()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        kind(config)


def test_old_transformers_are_named(monkeypatch):
    monkeypatch.setattr(hbert.config, "version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"need transformers >= 5.0; installed is 4.57.1"):
        hbert.config._require_transformers()


def test_missing_transformers_are_named(monkeypatch):
    def missing(name):
        raise hbert.config.PackageNotFoundError(name)

    monkeypatch.setattr(hbert.config, "version", missing)
    with pytest.raises(ImportError, match="need transformers >= 5.0; it is not installed"):
        hbert.config._require_transformers()
