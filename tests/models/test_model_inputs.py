"""Bad inputs: each its own exception, with a message that says what is allowed."""

from __future__ import annotations

import pytest
import torch
from model_helpers import VOCAB, dense_twin, small_masked_lm, small_model

IDS = torch.ones(2, 7, dtype=torch.int64)
ONES = torch.ones(2, 7, dtype=torch.int64)
EMBEDS = torch.zeros(2, 7, 12, dtype=torch.float64)
CU = torch.tensor([0, 3, 7], dtype=torch.int32)

BAD_CALLS = {
    "nothing": ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, ValueError, "exactly one of"),
    "float ids": ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32"),
    "1-d ids": ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \[B, N\]"),
    "integer embeddings": ({"inputs_embeds": EMBEDS.long()}, TypeError, "must be floating"),
    "wide embeddings": ({"inputs_embeds": EMBEDS[..., :11]}, ValueError, r"\[B, N, 12\]"),
    "float mask": ({"attention_mask": ONES.double()}, TypeError, "bool or integer"),
    "3-d mask": ({"attention_mask": ONES[:, None]}, ValueError, r"attention_mask must be \[B, N\]"),
    "4-d mask": ({"attention_mask": ONES[:, None, None]}, ValueError, r"attention_mask must be \[B, N\]"),
    "short mask": ({"attention_mask": ONES[:, :6]}, ValueError, r"\[B, N\] = \(2, 7\)"),
    "id too large": ({"input_ids": IDS * VOCAB}, ValueError, rf"input_ids must be in \[0, {VOCAB}\).* {VOCAB} to"),
    "negative id": ({"input_ids": -IDS}, ValueError, "found values from -1 to -1"),
    "position too large": ({"position_ids": ONES * 48}, ValueError, r"position_ids must be in \[0, 48\)"),
    "position shape": ({"position_ids": ONES[0]}, ValueError, "position_ids must have the shape of the inputs"),
    "float position": ({"position_ids": ONES.double()}, TypeError, "position_ids must be an integer"),
    "token type": ({"token_type_ids": ONES * 2}, ValueError, r"token_type_ids must be in \[0, 2\)"),
    "type shape": ({"token_type_ids": ONES[:, :3]}, ValueError, "token_type_ids must have the shape"),
    "too long": ({"input_ids": torch.ones(1, 49, dtype=torch.int64)}, ValueError, "49 exceeds .* 48"),
    "lone max_seqlen": ({"max_seqlen": 7}, ValueError, "max_seqlen needs cu_seqlens"),
    "lone cu_seqlens": ({"input_ids": IDS[0], "cu_seqlens": CU}, ValueError, "cu_seqlens needs max_seqlen"),
    "padded ids with cu_seqlens": ({"cu_seqlens": CU, "max_seqlen": 4}, ValueError, r"input_ids must be \[T\]"),
    "int64 cu_seqlens": (
        {"input_ids": IDS[0], "cu_seqlens": CU.long(), "max_seqlen": 4},
        TypeError,
        r"cu_seqlens must be int32 \[B\+1\]",
    ),
    "mask and cu_seqlens": (
        {"input_ids": IDS[0], "attention_mask": ONES[0], "cu_seqlens": CU, "max_seqlen": 4},
        ValueError,
        "cannot be combined with attention_mask",
    ),
    "cu_seqlens beyond the tokens": (
        {"input_ids": IDS[0, :6], "cu_seqlens": CU, "max_seqlen": 4},
        ValueError,
        "only 6 tokens",
    ),
    "sequence over max_seqlen": (
        {"input_ids": IDS[0], "cu_seqlens": CU, "max_seqlen": 3},
        ValueError,
        "4 tokens, but max_seqlen is 3",
    ),
    "max_seqlen over the table": (
        {"input_ids": IDS[0], "cu_seqlens": CU, "max_seqlen": 49},
        ValueError,
        "49 exceeds max_position_embeddings 48",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_of_the_encoder(call, error, message):
    model = small_model(type_vocab_size=2)
    if not {"input_ids", "inputs_embeds"} & call.keys() and call:
        call = {"input_ids": IDS, **call}
    with pytest.raises(error, match=message):
        model(**call)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_one_row_of_ids_stands_for_all(name):
    model = small_model(type_vocab_size=2)
    row = torch.tensor([[1, 0, 1, 0, 0, 1, 1]])
    for variant in (model, dense_twin(model)):
        found = variant(IDS, **{name: row}).last_hidden_state
        assert torch.equal(found, variant(IDS, **{name: row.expand(2, 7)}).last_hidden_state)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_the_longest_sequence_is_the_position_table(positions):
    model = small_model(positions=positions)
    ids = torch.ones(1, 49, dtype=torch.int64)
    assert model(ids[:, :48]).last_hidden_state.isfinite().all()
    for variant in (model, dense_twin(model)):
        with pytest.raises(ValueError, match="49 exceeds max_position_embeddings 48"):
            variant(ids)


BAD_LABELS = {
    "too large": (ONES * VOCAB, ValueError, rf"labels must be in \[0, {VOCAB}\) or -100"),
    "negative": (ONES * -1, ValueError, "found values from -1 to -1"),
    "shape": (ONES[:, :6], ValueError, "labels must have the shape of the inputs"),
    "int32": (ONES.int(), TypeError, "labels must be int64"),
}


@pytest.mark.parametrize(("labels", "error", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        small_masked_lm()(IDS, labels=labels)


def test_float16_models_do_not_run_on_a_cpu():
    model = small_masked_lm(dtype=torch.float16)
    for variant in (model, dense_twin(model)):
        with pytest.raises(TypeError, match="bfloat16 or float32"):
            variant(IDS)


def test_packed_data_does_not_run_on_the_dense_layout():
    with pytest.raises(ValueError, match="cannot be combined with attn_implementation"):
        dense_twin(small_model())(IDS[0], cu_seqlens=CU, max_seqlen=4)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_other_attention_implementations_are_refused(name):
    with pytest.raises((ValueError, ImportError)):
        small_model(attn_implementation=name)
