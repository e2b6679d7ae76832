"""The embedding of the ids in place of the ids: the same bits from every model, in every layout."""

from __future__ import annotations

import pytest
import torch
from model_helpers import batch, dense_twin, small_model

from hbert import (
    HBertForMaskedLM,
    HBertForQuestionAnswering,
    HBertForSequenceClassification,
    HBertForTokenClassification,
    HBertModel,
)
from hbert_kernels.packing import Packing

IDS, MASK = batch()
LABELS = {
    HBertModel: {},
    HBertForMaskedLM: {"labels": IDS.masked_fill(IDS % 2 == 0, -100)},
    HBertForSequenceClassification: {"labels": torch.tensor([1, 0, 1, 1])},
    HBertForTokenClassification: {"labels": IDS % 2},
    HBertForQuestionAnswering: {
        "start_positions": torch.tensor([0, 7, 7, 7]),
        "end_positions": torch.tensor([6, 7, 7, 7]),
    },
}


def assert_same(model, ids, **arguments):
    embeds = model.get_input_embeddings()(ids).detach()
    expected, found = model(input_ids=ids, **arguments), model(inputs_embeds=embeds, **arguments)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dense", [False, True])
def test_padded(kind, dense):
    model = small_model(kind, layer_types="AS", positions="learned", type_vocab_size=2)
    types = torch.arange(IDS.shape[1]).expand_as(IDS) % 2
    run = dense_twin(model) if dense else model
    assert_same(run, IDS, attention_mask=MASK, token_type_ids=types, **LABELS[kind])


@pytest.mark.parametrize("kind", [kind for kind in LABELS if kind is not HBertForQuestionAnswering])
def test_packed(kind):
    packing = Packing.from_mask(MASK, static=False)
    per_token = kind is not HBertForSequenceClassification
    labels = {name: t[MASK] if per_token else t for name, t in LABELS[kind].items()}
    assert_same(small_model(kind), IDS[MASK], cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen, **labels)
