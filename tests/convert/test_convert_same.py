"""Without a target a converted encoder computes what the checkpoint computes."""

import itertools
import json

import pytest
import torch
from convert_helpers import FAMILIES, assert_accounted, assert_same_function, batch, small
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForPreTraining, BertForSequenceClassification

from hbert import HBertForMaskedLM, HBertModel
from hbert.convert import from_pretrained
from hbert.data import load_tokenizer

CASES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "relu": {"hidden_act": "relu", "activation": "relu"},
    "tanh": {"hidden_act": "gelu_new", "activation": "gelu_new"},
}


def own_fields(family, case):
    names = ("activation",) if family == "distilbert" else ("hidden_act",)
    return {name: value for name, value in CASES[case].items() if name in (*names, "tie_word_embeddings")}


@pytest.mark.parametrize(
    ("family", "masked_lm", "case"),
    [
        (family, masked_lm, case)
        for family, masked_lm, case in itertools.product(FAMILIES, (False, True), CASES)
        # The head of RoBERTa has gelu always: refused.
        if not (family.endswith("roberta") and masked_lm and case in ("relu", "tanh"))
    ],
)
def test_the_same_hidden_states_and_logits(family, masked_lm, case):
    theirs = small(family, masked_lm, **own_fields(family, case))
    ours, report = from_pretrained(theirs)
    assert type(ours) is (HBertForMaskedLM if masked_lm else HBertModel)
    assert_same_function(theirs, ours, *batch(theirs.config.pad_token_id))
    assert_accounted(theirs.state_dict(), ours, report)
    assert not report.fresh
    if masked_lm:
        tied = ours.head.decoder.weight is ours.get_input_embeddings().weight
        assert tied == (case != "untied")


def test_token_types():
    theirs = small("bert", masked_lm=True)
    ids, mask = batch(0)
    types = torch.arange(ids.shape[1]).expand(ids.shape) % 2
    assert_same_function(theirs, from_pretrained(theirs)[0], ids, mask, token_type_ids=types)


def test_padding_on_the_left_as_in_roberta_that_counts_tokens():
    theirs = small("roberta")
    ids, mask = batch(theirs.config.pad_token_id)
    assert_same_function(theirs, from_pretrained(theirs)[0], ids.flip(1), mask.flip(1))


def test_configuration():
    config = from_pretrained(small("roberta", hidden_dropout_prob=0.2, layer_norm_eps=1e-5))[0].config
    assert config.layer_types == ["full_attention"] * 3 and config.norm_style == "post_ln"
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.1)
    assert (config.layer_norm_eps, config.max_position_embeddings, config.pad_token_id) == (1e-5, 24, 1)
    config = from_pretrained(small("distilbert", attention_dropout=0.3))[0].config
    assert (config.attention_probs_dropout_prob, config.type_vocab_size, config.intermediate_size) == (0.3, 0, 20)


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForSequenceClassification])
def test_other_heads_are_left_out(kind):
    theirs = small("bert", kind=kind)
    ours, report = from_pretrained(theirs)
    assert_same_function(theirs.bert, ours.base_model, *batch(0))
    assert_accounted(theirs.state_dict(), ours, report)
    other = "cls.seq_relationship.weight" if kind is BertForPreTraining else "classifier.weight"
    assert report.left_out[other] == "a head of another task"
    assert report.left_out["bert.pooler.dense.bias"] == "HBERT has no pooler"


def test_nothing_is_shared_with_the_checkpoint():
    theirs = small("bert", masked_lm=True)
    ours, _ = from_pretrained(theirs)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    perturb_all(theirs)
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())
    assert not ours.training


def perturb_all(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)


def shards(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, folder / f"model-{number}.safetensors")
        weight_map |= {name: f"model-{number}.safetensors" for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def old_pickle(folder):
    """As the first checkpoints of BERT: gamma and beta, and the decoder's bias under one name only."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in state.items()}  # fmt: skip
    assert "cls.predictions.bias" in old and "cls.predictions.decoder.bias" not in old
    torch.save(old, folder / "pytorch_model.bin")


@pytest.mark.parametrize("rewrite", [lambda folder: None, shards, old_pickle], ids=["whole", "shards", "old"])
def test_folders(tmp_path, rewrite):
    theirs = small("bert", masked_lm=True)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path)
    ours, report = from_pretrained(tmp_path)
    assert_same_function(theirs, ours, *batch(0))
    assert not report.fresh


def test_half_precision_is_widened(tmp_path):
    theirs = small("distilbert", masked_lm=True).half()
    theirs.save_pretrained(tmp_path)
    ours, _ = from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_function(theirs.float(), ours, *batch(0))


def test_minilm(minilm):
    theirs = AutoModel.from_pretrained(minilm).eval()
    ours, report = from_pretrained(minilm)
    tokenizer = load_tokenizer(minilm)
    tokenizer.enable_padding(pad_id=0)
    encodings = tokenizer.encode_batch(["A short one.", "Padding must change nothing, however long the others are."])
    ids, mask = (torch.tensor([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
    assert 0 < mask[0].sum() < mask[1].sum() == mask.shape[1]
    assert_same_function(theirs, ours, ids, mask)
    assert_accounted(load_file(minilm / "model.safetensors"), ours, report)
    assert set(report.left_out) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}


def test_the_report_reads_well():
    _, report = from_pretrained(small("distilbert"))
    lines = str(report).splitlines()
    assert "moved     layers.{0-2}.ffn.fc1.bias  <-  transformer.layer.{0-2}.ffn.lin1.bias" in lines
    assert len(lines) == 4 + 12
