"""Heads and checkpoints: swapping heads, half precision, shards, copies, pipelines, sentence-transformers."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from model_helpers import VOCAB, batch, small_masked_lm, small_model
from test_transformers_integration import run_python, small_tokenizer
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import hbert
from hbert import HBertForQuestionAnswering, HBertForSequenceClassification, HBertForTokenClassification

KINDS = {
    HBertForSequenceClassification: AutoModelForSequenceClassification,
    HBertForTokenClassification: AutoModelForTokenClassification,
    HBertForQuestionAnswering: AutoModelForQuestionAnswering,
}
NAMES = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}


@pytest.mark.parametrize("kind", KINDS)
def test_reloading_gives_the_same_bits(tmp_path, kind):
    model = small_model(kind, dtype=torch.float32)
    ids, mask = batch()
    model.save_pretrained(tmp_path)
    loaded = KINDS[kind].from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert torch.equal(loaded(ids, mask)[0], model(ids, mask)[0])
    loaded.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids, mask)[0], model(ids, mask)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_goes_on_a_masked_lm_checkpoint(tmp_path, kind):
    source = small_masked_lm(dtype=torch.float32)
    source.save_pretrained(tmp_path)
    model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    ours = {name for name in model.state_dict() if not name.startswith("hbert.")}
    assert ours and set(info["missing_keys"]) == ours
    assert info["unexpected_keys"] and all(name.startswith("head.") for name in info["unexpected_keys"])
    ids, mask = batch()
    assert torch.equal(model.hbert(ids, mask).last_hidden_state, source.hbert(ids, mask).last_hidden_state)
    for name, parameter in model.named_parameters():
        if name in ours:
            assert torch.isfinite(parameter).all()
            assert name.endswith("bias") != bool(parameter.any()), name


def test_another_number_of_labels_needs_the_word_for_it(tmp_path):
    small_model(HBertForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HBertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    model = HBertForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model(*batch()).logits.shape == (4, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads(tmp_path, dtype):
    model = small_model(HBertForSequenceClassification, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = HBertForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {t.dtype for t in loaded.parameters()} == {dtype}
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtype)), name


def test_shards(tmp_path):
    model = small_masked_lm(dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    ids, mask = batch()
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(copied):
    model = small_masked_lm(dtype=torch.float32, layer_types="AAS", conv_kernel_size=3)
    ids, mask = batch()
    before = model(ids, mask).logits
    twin = copied(model)
    assert twin.head.decoder.weight is twin.get_input_embeddings().weight
    assert torch.equal(twin(ids, mask).logits, before)
    with torch.no_grad():
        twin.get_input_embeddings().weight.add_(1)
    assert not torch.equal(twin(ids, mask).logits, before)
    assert torch.equal(model(ids, mask).logits, before)


def saved(folder, kind, **fields):
    model = small_model(kind, dtype=torch.float32, **fields)
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return model


def test_text_classification_pipeline(tmp_path):
    model = saved(tmp_path, HBertForSequenceClassification, **NAMES)
    texts = ["w1 w2 w3", "w4"]
    found = pipeline("text-classification", model=str(tmp_path))(texts, batch_size=2)
    for text, answer in zip(texts, found, strict=True):
        probabilities = model(**small_tokenizer()(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert answer["label"] == NAMES["id2label"][int(probabilities.argmax())]
        assert answer["score"] == pytest.approx(float(probabilities.max()), rel=1e-4)


def test_token_classification_pipeline(tmp_path):
    model = saved(tmp_path, HBertForTokenClassification, **NAMES)
    text = "w1 w2 w3 w7"
    found = pipeline("token-classification", model=str(tmp_path), ignore_labels=[])(text)
    probabilities = model(**small_tokenizer()(text, return_tensors="pt")).logits.softmax(-1)[0]
    assert [answer["entity"] for answer in found] == [NAMES["id2label"][i] for i in probabilities.argmax(-1).tolist()]
    assert [answer["score"] for answer in found] == pytest.approx(probabilities.amax(-1).tolist(), rel=1e-4)


def test_sentence_transformers_wraps_the_encoder(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    saved(tmp_path, hbert.HBertModel)
    words = Transformer(str(tmp_path), max_seq_length=16)
    wrapped = SentenceTransformer(modules=[words, Pooling(12, pooling_mode="mean")], device="cpu")
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    encoder = hbert.HBertModel.from_pretrained(tmp_path)
    expected = [encoder(**small_tokenizer()(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts]
    embeddings = wrapped.encode(texts, batch_size=3, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "imports",
    [
        "import hbert; from transformers import AutoModelForSequenceClassification as Auto",
        "import hbert; import transformers; Auto = transformers.AutoModelForSequenceClassification",
        "import transformers; import hbert; Auto = transformers.AutoModelForSequenceClassification",
        "from transformers import AutoModelForSequenceClassification as Auto; import hbert",
        "import hbert.modeling; from transformers import AutoModelForSequenceClassification as Auto",
        "import hbert.heads; from transformers import AutoModelForSequenceClassification as Auto",
        "import hbert.convert; from transformers import AutoModelForSequenceClassification as Auto",
        "import hbert.data; from transformers import AutoModelForSequenceClassification as Auto",
    ],
)
def test_auto_classes_know_the_models_whatever_is_imported_first(tmp_path, imports):
    saved(tmp_path, HBertForSequenceClassification)
    code = f"{imports}; print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)"
    assert run_python(code) == "HBertForSequenceClassification"


def test_auto_config_and_auto_tokenizer_know_them_alone(tmp_path):
    saved(tmp_path, HBertForSequenceClassification)
    code = (
        "import hbert, sys; from transformers import AutoConfig, AutoTokenizer;"
        f"print(AutoConfig.from_pretrained({str(tmp_path)!r}).model_type,"
        f"len(AutoTokenizer.from_pretrained({str(tmp_path)!r})))"
    )
    assert run_python(code) == f"hbert {VOCAB}"
