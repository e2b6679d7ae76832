"""optimize() of encoders of transformers: what they compute, called as they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convert_helpers import FAMILIES
from patch_helpers import MASKS, assert_equal_where_valid, batch_of, small

from hbert import optimize

FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", MASKS)
def test_encoders_of_transformers(family, padding):
    model = small(family).float().eval()
    inputs = batch_of(model, padding)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
    found = optimize(model)(**inputs, output_hidden_states=True)
    mask = inputs.get("attention_mask")
    assert_equal_where_valid(expected.hidden_states, found.hidden_states, mask, 1e-5)
    pooled = getattr(expected, "pooler_output", None)
    if pooled is not None and (mask is None or bool(mask[:, 0].all())):  # it reads the first column
        assert_equal_where_valid((pooled,), (found.pooler_output,), tolerance=1e-5)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_padding_that_no_mask_takes_out_of_a_model_that_counts_tokens(family):
    model = small(family).float().eval()
    fast, inputs = optimize(model), batch_of(model, "right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    given = torch.arange(2, 2 + ids.shape[1]).expand_as(ids)
    for wrong in (None, torch.ones_like(mask)):
        with pytest.raises(ValueError, match="row 1 has the padding id 1 in column 1, which attention_mask does not"):
            fast(ids, wrong)
        with torch.no_grad():
            expected = model(ids, wrong, position_ids=given).last_hidden_state
        torch.testing.assert_close(fast(ids, wrong, position_ids=given).last_hidden_state, expected, **FP32)
    fast(ids, mask.bool())


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_texts_than_positions_are_refused_with_their_length(family):
    fast = optimize(small(family).float())
    with pytest.raises(ValueError, match="sequence length 25 exceeds the 24 positions"):
        fast(torch.full((1, 25), 7))
    padding = fast.config.pad_token_id
    if family in ("roberta", "xlm-roberta"):  # they count tokens
        padded = torch.tensor([[7] * 24 + [padding]])
        assert fast(padded, padded != padding).last_hidden_state.isfinite().all()


def test_a_bert_may_attend_to_padding():
    model = small("bert").float().eval()
    ids = batch_of(model, "right")["input_ids"]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    torch.testing.assert_close(optimize(model)(ids).last_hidden_state, expected, **FP32)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_calls_in_the_forms_that_transformers_takes(family):
    model = small(family).float().eval()
    inputs = batch_of(model, "right")
    mask = inputs["attention_mask"]
    row = torch.arange(mask.shape[1])[None]
    inputs |= {"attention_mask": mask.float(), "position_ids": row + 2, "token_type_ids": torch.zeros_like(row)}
    with torch.no_grad():
        expected = model(**inputs, use_cache=True)
    assert_equal_where_valid(expected, optimize(model)(**inputs, use_cache=True), mask, tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_transformers(family):
    model = small(family, masked_lm=True).float().eval()
    inputs = batch_of(model, "right")
    fast = optimize(model)
    assert type(fast) is type(model)
    mask = inputs["attention_mask"] == 1
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(fast(**inputs).logits[mask], expected[mask], **FP32)


TEXTS = ["A short one.", "Encoders that people already have run without padding, " * 3, "Third."]


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 0.999999), ("bf16", 0.9999), ("int8", 0.995)])
def test_the_real_minilm(minilm, dtype, least):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    weights = inputs["attention_mask"][..., None].float()

    def embed(encoder):
        with torch.no_grad():
            states = encoder(**inputs).last_hidden_state.float()
        return (states * weights).sum(1) / weights.sum(1)

    assert torch.cosine_similarity(embed(optimize(model, dtype)), embed(model)).min() > least


def test_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    np.testing.assert_allclose(optimize(model).encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_pipelines(minilm):
    from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

    model = BertForSequenceClassification.from_pretrained(minilm).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    expected, found = (
        pipeline("text-classification", model=m, tokenizer=tokenizer, batch_size=2)(TEXTS)
        for m in (model, optimize(model))
    )
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    np.testing.assert_allclose([row["score"] for row in found], [row["score"] for row in expected], atol=1e-4)
