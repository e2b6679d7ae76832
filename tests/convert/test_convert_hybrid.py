"""What moves into an encoder of another kind, and that what corresponds to nothing keeps its first value."""

import pytest
import torch
from convert_helpers import assert_accounted, assert_same_function, batch, perturb, small, small_target

from hbert import HBertForMaskedLM, HBertModel
from hbert.convert import from_pretrained, read_source, transfer

BERT_LAYER = "encoder.layer.{}."
VARIANTS = [
    {"layer_types": "SSS", "norm_style": "post_ln"},
    {"layer_types": "AAA", "norm_style": "pre_ln", "scorer": "per_head"},
    {"layer_types": "SAS", "norm_style": "merge"},
    {"layer_types": "ASA", "norm_style": "sub_ln", "conv_kernel_size": 3},
    {"layer_types": "SAS", "norm_style": "sub_ln", "conv_kernel_size": 5, "conv_placement": "branch"},
    {"layer_types": "ASA", "positions": "sinusoidal", "type_vocab_size": 0},
]


def converted(target, masked_lm=False, **fields):
    """(state of a BERT, without prefixes; state of what became of it, without prefixes; report)."""
    theirs = small("bert", masked_lm, **fields)
    torch.manual_seed(5)
    first = (HBertForMaskedLM if masked_lm else HBertModel)(target).state_dict()
    torch.manual_seed(5)
    ours, report = from_pretrained(theirs, target)
    assert_accounted(theirs.state_dict(), ours, report)
    state = {name.removeprefix("bert."): t for name, t in theirs.state_dict().items()}
    for name in report.fresh:
        assert torch.equal(ours.state_dict()[name], first[name]), name
    return state, {name.removeprefix("hbert."): t for name, t in ours.state_dict().items()}, report


def test_an_additive_layer_takes_value_key_and_output():
    theirs, ours, report = converted(small_target(layer_types="ASA"))
    for layer in (0, 2):
        attention = BERT_LAYER.format(layer) + "attention."
        for leaf in ("weight", "bias"):
            pairs = {"query": "self.value", "key": "self.key", "transform": "output.dense"}
            for name, other in pairs.items():
                found = ours[f"layers.{layer}.attention.{name}.{leaf}"]
                assert torch.equal(found, theirs[f"{attention}{other}.{leaf}"])
            assert report.left_out[f"{attention}self.query.{leaf}"].startswith("the query of an additive layer")
    expected = torch.cat(
        [theirs[f"encoder.layer.1.attention.self.{name}.weight"] for name in ("query", "key", "value")]
    )
    assert torch.equal(ours["layers.1.attention.qkv.weight"], expected)
    fresh = {name.split(".", 2)[2] for name in report.fresh if name.startswith("layers.0.")}
    scorers = {f"attention.{name}.{leaf}" for name in ("query_att", "key_att") for leaf in ("weight", "bias")}
    norms = {
        f"{name}.{leaf}" for name in ("attention.norm", "ffn.norm", "attention_norm") for leaf in ("weight", "bias")
    }
    assert fresh == scorers | norms


@pytest.mark.parametrize("style", ["pre_ln", "sub_ln"])
def test_a_norm_goes_with_the_layer_that_reads_it(style):
    theirs, ours, report = converted(small_target(norm_style=style))
    readers = {
        "layers.0.ffn_norm": "encoder.layer.0.attention.output.LayerNorm",
        "layers.1.attention_norm": "encoder.layer.0.output.LayerNorm",
        "layers.2.ffn_norm": "encoder.layer.2.attention.output.LayerNorm",
        "norm": "encoder.layer.2.output.LayerNorm",
        "embeddings.norm": "embeddings.LayerNorm",
    }
    for name, other in readers.items():
        assert torch.equal(ours[f"{name}.weight"], theirs[f"{other}.weight"])
        assert torch.equal(ours[f"{name}.bias"], theirs[f"{other}.bias"])
    assert torch.equal(ours["layers.0.attention_norm.weight"], torch.ones(12))
    assert report.fresh["layers.0.attention_norm.weight"] == "nothing in the checkpoint corresponds"


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("masked_lm", [False, True])
def test_everything_is_accounted_for(fields, masked_lm):
    theirs, ours, report = converted(small_target(**fields), masked_lm)
    for layer in range(3):
        for name, other in (("ffn.fc1", "intermediate.dense"), ("ffn.fc2", "output.dense")):
            expected = theirs[f"{BERT_LAYER.format(layer)}{other}.weight"]
            assert torch.equal(ours[f"layers.{layer}.{name}.weight"], expected)
    if masked_lm:
        assert torch.equal(ours["head.decoder.bias"], theirs["cls.predictions.decoder.bias"])
        assert torch.equal(ours["head.decoder.weight"], theirs["embeddings.word_embeddings.weight"])


def test_without_token_types_the_function_stays():
    theirs = small("bert")
    target = small_target(layer_types="SSS", norm_style="post_ln", type_vocab_size=0)
    ours, report = from_pretrained(theirs, target)
    assert_same_function(theirs, ours, *batch(0))
    move = report.moved["embeddings.position_embeddings.weight"]
    assert len(move.sources) == 2 and move.note == "with token type 0 in every row"
    assert not report.fresh


def test_fewer_positions():
    theirs = small("bert")
    target = small_target(layer_types="SSS", norm_style="post_ln", max_position_embeddings=11)
    ours, report = from_pretrained(theirs, target)
    assert_same_function(theirs, ours, *batch(0))
    assert not report.fresh


@pytest.mark.parametrize(
    ("fields", "name", "reason"),
    [
        ({"type_vocab_size": 3}, "embeddings.token_type_embeddings.weight", "2 x 12 in the checkpoint, 3 x 12 here"),
        ({"intermediate_size": 16}, "layers.0.ffn.fc1.weight", "20 x 12 in the checkpoint, 16 x 12 here"),
        ({"num_attention_heads": 4}, "layers.1.attention.out.weight", "3 heads in the checkpoint, 4 here"),
        ({"num_attention_heads": 4}, "layers.0.attention.query.weight", "3 heads in the checkpoint, 4 here"),
    ],
)
def test_other_sizes_stay_fresh(fields, name, reason):
    _, _, report = converted(small_target(**fields))
    assert report.fresh[name].startswith(reason)


def test_what_is_left_out_for_its_size_says_both_sizes():
    _, _, report = converted(small_target(intermediate_size=16))
    reason = "20 x 12 in the checkpoint, 16 x 12 here"
    assert report.left_out["encoder.layer.0.intermediate.dense.weight"] == reason


@pytest.mark.parametrize("layers", ["AS", "ASAS", "ASAA"])
def test_other_depths(layers):
    target = small_target(layer_types=layers, num_hidden_layers=len(layers))
    theirs, ours, report = converted(target)
    # The last norm is read by whatever comes behind the encoder.
    assert torch.equal(ours["norm.weight"], theirs["encoder.layer.2.output.LayerNorm.weight"])
    if len(layers) == 2:
        assert report.left_out["encoder.layer.2.output.dense.weight"] == "nothing in this model corresponds"
    else:
        beyond = {why for name, why in report.fresh.items() if name.startswith("layers.3.")}
        assert beyond == {"nothing in the checkpoint corresponds"}


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", [HBertModel, HBertForMaskedLM])
def test_our_own_checkpoints_come_back_bit_for_bit(tmp_path, fields, kind):
    theirs = perturb(kind(small_target(**fields)))
    theirs.save_pretrained(tmp_path)
    ours, report = from_pretrained(tmp_path)
    assert not report.fresh and type(ours) is kind and ours.config is not theirs.config
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in theirs.state_dict().items())
    assert_accounted(theirs.state_dict(), *from_pretrained(theirs))


def test_there_and_back_between_norm_styles():
    theirs = small("bert")
    pre, _ = from_pretrained(theirs, small_target(layer_types="SSS", norm_style="pre_ln"))
    back, report = from_pretrained(pre, small_target(layer_types="SSS", norm_style="post_ln"))
    assert_same_function(theirs, back, *batch(0))
    assert not report.fresh
    assert set(report.left_out) == {"layers.0.attention_norm.weight", "layers.0.attention_norm.bias"}


def test_an_additive_layer_does_not_become_self_attention():
    theirs = perturb(HBertModel(small_target(layer_types="AAA")))
    _, report = from_pretrained(theirs, small_target(layer_types="ASA"))
    assert report.fresh["layers.1.attention.qkv.weight"] == "additive attention in the checkpoint only"
    assert "layers.1.attention.query.weight" in report.left_out
    assert report.moved["layers.0.attention.query_att.weight"].sources == ("layers.0.attention.query_att.weight",)


@pytest.mark.parametrize("tied", [True, False])
def test_the_token_embedding_alone(tied):
    model = perturb(HBertForMaskedLM(small_target(tie_word_embeddings=tied)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    theirs = small("bert")
    report = transfer(read_source(theirs), model, "embeddings")
    assert list(report.moved) == ["hbert.embeddings.word_embeddings.weight"]
    assert_accounted(theirs.state_dict(), model, report)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {*report.moved, *(["head.decoder.weight"] if tied else [])}
    assert torch.equal(model.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_a_decoder_of_its_own_and_one_that_shares():
    untied, tied = (small_target(tie_word_embeddings=t) for t in (False, True))
    theirs = small("bert", masked_lm=True)
    ours, _ = from_pretrained(theirs, untied)
    assert torch.equal(ours.head.decoder.weight, theirs.get_input_embeddings().weight)
    assert ours.head.decoder.weight is not ours.get_input_embeddings().weight
    theirs = small("bert", masked_lm=True, tie_word_embeddings=False)
    _, report = from_pretrained(theirs, tied)
    assert report.left_out["cls.predictions.decoder.weight"] == "the decoder shares the token embedding here"
