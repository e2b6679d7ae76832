"""Small models of every family that can be converted, and batches for them."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from hbert import HBertConfig

VOCAB, WIDTH, HEADS, LENGTH = 61, 12, 3, 24
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 3}
BERT_SIZES = {**SIZES, "intermediate_size": 20, "max_position_embeddings": LENGTH}
# Behind the padding id 1 begins the table of RoBERTa.
ROBERTA_SIZES = {**BERT_SIZES, "max_position_embeddings": LENGTH + 2, "pad_token_id": 1}
DISTIL_SIZES = {"vocab_size": VOCAB, "dim": WIDTH, "n_heads": HEADS, "n_layers": 3, "hidden_dim": 20}
FAMILIES = {
    "bert": (BertConfig, BertModel, BertForMaskedLM, BERT_SIZES),
    "roberta": (RobertaConfig, RobertaModel, RobertaForMaskedLM, {**ROBERTA_SIZES, "type_vocab_size": 1}),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, XLMRobertaForMaskedLM, ROBERTA_SIZES),
    "distilbert": (
        DistilBertConfig,
        DistilBertModel,
        DistilBertForMaskedLM,
        {**DISTIL_SIZES, "max_position_embeddings": LENGTH},
    ),
}


def perturb(model, seed=1):
    """Moves every parameter, so that no norm is the identity, no bias zero and no row of a table empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def small(family, masked_lm=False, kind=None, **fields):
    config_class, encoder, with_head, sizes = FAMILIES[family]
    torch.manual_seed(0)
    return perturb((kind or (with_head if masked_lm else encoder))(config_class(**{**sizes, **fields})))


def small_target(**fields):
    return HBertConfig(
        **{
            **SIZES,
            "intermediate_size": 20,
            "max_position_embeddings": LENGTH,
            "positions": "learned",
            "type_vocab_size": 2,
            "layer_types": "ASA",
            **fields,
        }
    )


def batch(pad, rows=3, length=11):
    """Ids, padded with ``pad`` on the right, and their mask; row 0 is full, row 1 one token."""
    ids = torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, valid in enumerate((length, 1, 6)):
        mask[row, valid:] = 0
    return ids.masked_fill(mask == 0, pad), mask


@torch.no_grad()
def states_and_logits(model, ids, mask, **inputs):
    """All hidden states and, last, the logits if there are any: of the valid tokens."""
    output = model(ids, attention_mask=mask, output_hidden_states=True, **inputs)
    found = [*output.hidden_states, *([output.logits] if "logits" in output else [output.last_hidden_state])]
    return [tensor[mask.bool()] for tensor in found]


def assert_same_function(theirs, ours, ids, mask, tolerance=1e-5, **inputs):
    expected = states_and_logits(theirs, ids, mask, **inputs)
    found = states_and_logits(ours, ids, mask, **inputs)
    assert len(expected) == len(found)
    for index, (e, f) in enumerate(zip(expected, found, strict=True)):
        assert (e - f).abs().max() <= tolerance, index


def assert_accounted(state, model, report):
    """Every tensor of a checkpoint and every parameter of the model stands in the report, in one place."""
    moved = {source for move in report.moved.values() for source in move.sources}
    assert not moved & report.left_out.keys()
    # A block of ours is named with its tensor: "layers.0.attention.qkv.weight [self_query]".
    assert {name.split(" ")[0] for name in moved | report.left_out.keys()} == set(state)
    assert not report.moved.keys() & report.fresh.keys()
    assert report.moved.keys() | report.fresh.keys() == {name for name, _ in model.named_parameters()}
