"""Optimized models on disk: what save_pretrained writes, what optimize(folder) reads, and what it refuses."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from convert_helpers import FAMILIES
from model_helpers import batch, small_masked_lm, small_model
from patch_helpers import batch_of, small

from hbert import HBertForSequenceClassification, HBertForTokenClassification, HBertModel, optimize, patch
from hbert.errors import HbertError

HYBRID = {"layer_types": "AAS", "conv_kernel_size": 3}
RECIPE = "hbert_optimize.json"


@pytest.fixture
def saved(tmp_path):
    """A folder with an optimized model."""
    optimize(small_model(dtype=torch.float32, **HYBRID), "bf16").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", [HBertModel, HBertForSequenceClassification, HBertForTokenClassification])
def test_what_was_saved_computes_the_same_bits(kind, dtype, tmp_path):
    model = small_model(kind, dtype=torch.float32, **HYBRID)
    fast = optimize(model, dtype)
    fast.save_pretrained(tmp_path / "saved")
    loaded = optimize(tmp_path / "saved")
    assert type(loaded) is type(fast)
    assert torch.equal(loaded(*batch())[0], fast(*batch())[0])
    plain = kind.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked_lm", [False, True])
def test_models_of_transformers(family, masked_lm, tmp_path):
    model = small(family, masked_lm).float()
    inputs = batch_of(model)
    fast = optimize(model)
    fast.save_pretrained(tmp_path / "saved")
    loaded = optimize(str(tmp_path / "saved"))
    assert type(loaded) is type(fast)
    for a, b in zip(loaded(**inputs).to_tuple(), fast(**inputs).to_tuple(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_was_never_optimized(tmp_path):
    model = small_masked_lm(dtype=torch.float32, **HYBRID)
    model.save_pretrained(tmp_path)
    fast = optimize(tmp_path, "fp32")
    torch.testing.assert_close(fast(*batch()).logits, model(*batch()).logits, rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in optimize(tmp_path).parameters()} == {torch.float32}


def test_a_recipe_is_a_default(saved):
    assert {p.dtype for p in optimize(saved).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in optimize(saved, "fp32").parameters()} == {torch.float32}
    versions = json.loads((saved / RECIPE).read_text())["versions"]
    assert versions["torch"] == torch.__version__ and versions["transformers"] == transformers.__version__


def test_a_checkpoint_without_a_pooler_gets_none(tmp_path):
    model = transformers.BertModel(small("bert").config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    assert optimize(tmp_path)(**batch_of(model)).pooler_output is None


def test_a_head_that_reads_the_pooler_needs_it(tmp_path):
    config = small("bert").config
    config.architectures = ["BertForSequenceClassification"]
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    model.bert.pooler = None
    model.save_pretrained(tmp_path)
    with pytest.raises(HbertError, match=r"incomplete \(2 are missing, such as bert.pooler.dense.bias"):
        optimize(tmp_path)


def test_the_model_of_a_folder_is_not_kept_and_read_again_to_be_saved(tmp_path):
    model = small_model(dtype=torch.float32, **HYBRID)
    model.save_pretrained(tmp_path / "plain")
    fast = optimize(tmp_path / "plain", "int8")
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not [one for one in gc.get_objects() if type(one) is HBertModel and one is not model]
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")  # is beside the model, not of it
    fast.save_pretrained(tmp_path / "saved")
    assert torch.equal(optimize(tmp_path / "saved")(*batch())[0], fast(*batch())[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: small_model(dtype=torch.float32, **HYBRID).save_pretrained(folder),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").unlink(),
        shutil.rmtree,
    ],
)
def test_a_folder_that_has_changed_is_not_saved(change, tmp_path):
    small_model(dtype=torch.float32).save_pretrained(tmp_path / "plain")
    fast = optimize(tmp_path / "plain")
    change(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain was changed after optimize"):
        fast.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_options_of_saving_are_passed_on(tmp_path):
    fast = optimize(small_masked_lm(dtype=torch.float32))
    fast.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert torch.equal(optimize(tmp_path / "shards")(*batch()).logits, fast(*batch()).logits)
    with pytest.raises(ValueError, match="would leave the recipe behind: call push_to_hub"):
        fast.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not (tmp_path / "pushed").exists()


def test_what_is_pushed_to_the_hub_has_the_recipe(monkeypatch):
    fast, uploaded = optimize(small_model(HBertForSequenceClassification, dtype=torch.float32), "bf16"), []
    hub, repo = transformers.utils.hub, SimpleNamespace(repo_id="me/fast")
    monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(create_repo=lambda *_, **__: repo))
    card = SimpleNamespace(save=lambda path: Path(path).write_text(""))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    upload = lambda self, folder, repo_id, **_: uploaded.extend([repo_id, *sorted(os.listdir(folder))])  # noqa: E731
    monkeypatch.setattr(HBertForSequenceClassification, "_upload_modified_files", upload)
    fast.push_to_hub("fast", max_shard_size="1GB")
    assert uploaded == ["me/fast", "README.md", "config.json", RECIPE, "model.safetensors"]


def sentence_transformer(folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    words = Transformer(str(folder))
    return SentenceTransformer(
        modules=[words, Pooling(words.get_word_embedding_dimension(), "cls"), Normalize()], device="cpu"
    )


def test_a_folder_of_sentence_transformers(minilm, tmp_path):
    texts = ["A short one.", "Encoders that people already have run without padding, " * 3, "Third."]
    model = sentence_transformer(minilm)
    model.save_pretrained(str(tmp_path / "plain"))
    fast = optimize(tmp_path / "plain", "fp32")
    np.testing.assert_allclose(fast.encode(texts), model.encode(texts), atol=1e-5)
    fast.save(tmp_path / "saved", create_model_card=False)
    assert not (tmp_path / "saved" / "README.md").exists()
    assert (tmp_path / "saved" / RECIPE).is_file()
    np.testing.assert_array_equal(optimize(tmp_path / "saved").encode(texts), fast.encode(texts))


def damage_recipe(folder, content):
    (folder / RECIPE).write_text(content)


def drop_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.ffn.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rename_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: damage_recipe(folder, "{"), "hbert_optimize.json is damaged; optimize.* does without it"),
        (lambda folder: damage_recipe(folder, '{"format": 1}'), "hbert_optimize.json is damaged"),
        (lambda folder: damage_recipe(folder, "[]"), "hbert_optimize.json is damaged"),
        (
            lambda folder: damage_recipe(folder, '{"format": 2, "dtype": "fp4", "versions": {"hbert": "9.9"}}'),
            "was written by hbert 9.9 in format 2; this one reads 1: upgrade",
        ),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights; allowed: model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded"),
        (drop_a_tensor, r"the weights are incomplete \(1 are missing, such as layers.1.ffn.fc1.weight\)"),
        (rename_architecture, "holds a NoSuchModel, which transformers .* does not have"),
    ],
)
def test_damaged_folders(saved, harm, message):
    harm(saved)
    with pytest.raises(HbertError, match=message):
        optimize(saved)


def test_no_such_folder(tmp_path):
    with pytest.raises(HbertError, match="no such folder: .*absent; a model of the hub"):
        optimize(tmp_path / "absent")


def test_a_recipe_may_name_no_unknown_dtype(saved):
    damage_recipe(saved, '{"format": 1, "dtype": "fp4", "versions": {"hbert": "0.1.0"}}')
    with pytest.raises(ValueError, match="dtype is 'fp4'; allowed"):
        optimize(saved)


def test_saving_writes_all_or_nothing(saved, tmp_path, monkeypatch):
    model = small_model(dtype=torch.float32)
    with pytest.raises(HbertError, match="saved is not an empty folder; choose another"):
        optimize(model).save_pretrained(saved)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hbert.inference.checkpoint.write_json", full)
    with pytest.raises(HbertError, match="other could not be written: .*No space left"):
        optimize(model).save_pretrained(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    "change", [lambda model: torch.nn.init.zeros_(model.embeddings.norm.weight), lambda model: model.double()]
)
def test_an_original_that_has_changed_is_not_saved(change, tmp_path):
    model = small_model(dtype=torch.float32)
    fast = optimize(model)
    change(model)
    with pytest.raises(ValueError, match="weights of this HBertModel were changed or moved after optimize"):
        fast.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: optimize(small_model()).state_dict(), "has no state_dict: save_pretrained of the whole model"),
        (
            lambda out: optimize(torch.nn.Sequential(small_model())).save_pretrained(out),
            "a Sequential has no save_pretrained",
        ),
        (lambda out: optimize(optimize(small_model())), "OptimizedHBertModel cannot be optimized: it is optimized"),
        (lambda out: optimize(patched()), "BertForMaskedLM cannot be optimized: its encoder is patched: hbert.unpatch"),
        (
            lambda out: optimize(transformers.ElectraModel(transformers.ElectraConfig(num_hidden_layers=1))),
            "it holds none of HBertModel, BertModel, .* but ElectraModel",
        ),
    ],
)
def test_what_is_refused(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")


def patched():
    model = small("bert", masked_lm=True)
    patch(model)
    return model
