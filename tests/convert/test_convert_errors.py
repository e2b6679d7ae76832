"""What cannot be converted is refused with its reason."""

import json

import pytest
import torch
from convert_helpers import small, small_target
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2Model

from hbert.convert import from_pretrained
from hbert.data import HbertError


@pytest.fixture
def folder(tmp_path):
    small("bert", masked_lm=True).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_state(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: GPT2Model(GPT2Config(n_layer=1, n_embd=12, n_head=3, vocab_size=61)),
            "this GPT2Model cannot be converted: its model_type is gpt2; allowed: bert, .*distilbert, hbert",
        ),
        (lambda: small("bert", hidden_act="silu"), "its activation is 'silu'; HBERT has gelu, gelu_new"),
        (lambda: small("bert", is_decoder=True), "it is a decoder"),
        (
            lambda: small("roberta", masked_lm=True, hidden_act="relu"),
            "its activation is 'relu', but 'gelu' in its masked-LM head",
        ),
    ],
)
def test_architectures(model, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(model())


def test_relative_positions(folder):
    change_config(folder, position_embedding_type="relative_key_query")
    with pytest.raises(ValueError, match="its positions are 'relative_key_query'; HBERT has absolute ones"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("bert.encoder.layer.1.output.dense.bias"),
            "tensor encoder.layer.1.output.dense.bias is missing",
        ),
        (
            lambda state: state.update({"bert.encoder.layer.0.attention.self.key.weight": torch.zeros(12, 8)}),
            r"tensor bert.encoder.layer.0.attention.self.key.weight has shape \(12, 8\); expected \(12, 12\)",
        ),
        (
            lambda state: state.update({"bert.encoder.layer.0.crossattention.self.key.weight": torch.zeros(12, 12)}),
            "such an encoder has not: bert.encoder.layer.0.crossattention.self.key.weight",
        ),
        (
            lambda state: state.update({"bert.encoder.layer.3.output.dense.bias": torch.zeros(12)}),
            "such an encoder has not: bert.encoder.layer.3.output.dense.bias",
        ),
        (
            lambda state: state.pop("cls.predictions.transform.dense.weight"),
            "tensor cls.predictions.transform.dense.weight is missing",
        ),
    ],
)
def test_tensors(folder, change, message):
    change_state(folder, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_an_untied_decoder_must_be_there(folder):
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tensor cls.predictions.decoder.weight is missing"):
        from_pretrained(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def wrap(folder, wrapping):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(wrapping(state), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights; allowed: model.safetensors, pyt"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors cannot be read"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pytorch_model.bin cannot be read",
        ),
        (
            lambda folder: wrap(folder, lambda state: {"model": state, "epoch": 3}),
            "pytorch_model.bin cannot be read: it holds more than tensors by name",
        ),
        (
            lambda folder: wrap(folder, lambda state: list(state.values())),
            "pytorch_model.bin cannot be read: it holds more than tensors by name",
        ),
    ],
)
def test_files(folder, damage, message):
    damage(folder)
    with pytest.raises(HbertError, match=message):
        from_pretrained(folder)


def test_a_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(HbertError, match="lacks model-1.safetensors"):
        from_pretrained(folder)
    index.write_text("[]")
    with pytest.raises(HbertError, match="is not an index of weight files"):
        from_pretrained(folder)


def test_what_is_no_checkpoint():
    with pytest.raises(TypeError, match="a checkpoint is a model of .* or the path of a folder, got NoneType"):
        from_pretrained(None)


def test_no_folder(tmp_path):
    with pytest.raises(HbertError, match="no such folder: .*nowhere; a model of the hub: save it first, or"):
        from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("sizes", [{"hidden_size": 24}, {"vocab_size": 60}])
def test_a_target_of_another_width_or_vocabulary(sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(
        ValueError, match=f"its {name} is {12 if name == 'hidden_size' else 61}, the model's is {value}"
    ):
        from_pretrained(small("bert"), small_target(**sizes))
