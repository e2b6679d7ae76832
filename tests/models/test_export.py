"""Export: ONNX files in ONNX Runtime, and torch.export of the packed form."""

from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
from model_helpers import VOCAB, batch, small_masked_lm, small_model
from safetensors.torch import load_file, save_file
from torch import nn

import hbert.export
from hbert import (
    HBertForMaskedLM,
    HBertForQuestionAnswering,
    HBertForSequenceClassification,
    HBertForTokenClassification,
    HBertModel,
)
from hbert.cli import main
from hbert.errors import HbertError
from hbert.export import export_onnx

HYBRID = {"layer_types": "AS", "conv_kernel_size": 3}
MERGE = {"norm_style": "merge", "scorer": "per_head", "positions": "learned", "type_vocab_size": 2}


def inputs(rows: int, length: int, types: bool) -> dict[str, torch.Tensor]:
    ids, mask = batch(rows, length, seed=length)
    mask[:, 0] = True
    found = {"input_ids": ids, "attention_mask": mask.long()}
    return {**found, "token_type_ids": torch.arange(length).expand(rows, -1) % 2} if types else found


@pytest.mark.parametrize(
    ("kind", "fields", "outputs"),
    [
        (HBertModel, MERGE, ["last_hidden_state"]),
        (HBertForSequenceClassification, HYBRID, ["logits"]),
        (HBertForQuestionAnswering, {"layer_types": "A", "norm_style": "post_ln"}, ["start_logits", "end_logits"]),
        (HBertForMaskedLM, {"norm_style": "pre_ln", "layer_types": "AS"}, ["logits"]),
        (
            HBertForTokenClassification,
            {"layer_types": "S", "conv_kernel_size": 3, "conv_placement": "branch"},
            ["logits"],
        ),
    ],
    ids=["encoder-merge", "sequences-hybrid", "answers-post_ln", "masked_lm-pre_ln", "tokens-branch"],
)
def test_onnx_runtime_gives_our_numbers_at_every_size(tmp_path, kind, fields, outputs):
    model = small_model(kind, dtype=torch.float32, **fields)
    path = export_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert model.config._attn_implementation != "eager"
    session = onnxruntime.InferenceSession(str(path))
    assert [output.name for output in session.get_outputs()] == outputs
    for rows, length in ((1, 1), (2, 7), (5, 48)):
        arguments = inputs(rows, length, "type_vocab_size" in fields)
        found = session.run(None, {name: t.numpy() for name, t in arguments.items()})
        for name, array in zip(outputs, found, strict=True):
            expected = model(**arguments)[name].detach()
            torch.testing.assert_close(torch.from_numpy(array), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_result_writes_nothing(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *_, **__):
            pass

        def run(self, _, feeds):
            return [np.full((*feeds["input_ids"].shape, VOCAB), np.nan, dtype=np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    with pytest.raises(HbertError, match="ONNX Runtime's logits is off by nan"):
        export_onnx(small_masked_lm(dtype=torch.float32, layer_types="S"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [0.1, np.nan])
def test_wrong_answers_write_nothing(tmp_path, monkeypatch, error):
    class Broken:
        def __init__(self, *_, **__):
            pass

        def run(self, _, feeds):
            given = {name: torch.from_numpy(array) for name, array in feeds.items()}
            with torch.no_grad():
                out = model(**given)
            wrong = error * given["attention_mask"] * (given["input_ids"].shape[1] > 1)
            return [(logits + wrong).numpy() for logits in (out.start_logits, out.end_logits)]

    model = small_model(HBertForQuestionAnswering, dtype=torch.float32, layer_types="S")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    with pytest.raises(HbertError, match=r"ONNX Runtime's start_logits is off by (0\.1|nan) at \(2, 8\)"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        hbert.export, "find_spec", lambda name: None if name == "onnxscript" else importlib.util.find_spec(name)
    )
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'hbert\[export\]'"):
        export_onnx(small_model(), tmp_path / "model.onnx")


def test_the_command_line(tmp_path, capsys):
    out = tmp_path / "model.onnx"
    small_model(dtype=torch.float32, layer_types="A").save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(out)]) == 0
    assert "HBertModel, checked in ONNX Runtime" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out))
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"]
    written = out.read_bytes()
    assert main(["export", str(tmp_path / "model"), str(out)]) == 2
    assert "exists; choose another name or pass --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == written
    small_model(HBertForTokenClassification, dtype=torch.float32, layer_types="A").save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(out), "--overwrite"]) == 0
    assert [output.name for output in onnxruntime.InferenceSession(str(out)).get_outputs()] == ["logits"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "model.onnx"]


@pytest.mark.parametrize("out", ["config.json/model.onnx", "/proc/model.onnx"])
def test_places_that_cannot_be_written_are_found_before_the_export(tmp_path, capsys, monkeypatch, out):
    def no_export(*_):
        raise AssertionError("the export has begun")

    monkeypatch.setattr(hbert.export, "_program", no_export)
    small_model(layer_types="A").save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(tmp_path), str(tmp_path / out)]) == 2
    stderr = capsys.readouterr().err
    assert f"hbert: error: {tmp_path / out} could not be written: " in stderr and stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_while_the_file_is_written(tmp_path, monkeypatch):
    class Program:
        def save(self, *_, **__):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(hbert.export, "_program", lambda *_: Program())
    with pytest.raises(HbertError, match=r"model\.onnx could not be written: .*No space left"):
        export_onnx(small_model(layer_types="A"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "is not a model folder: it has no config.json"),
        ({"model_type": "bert"}, "is a bert model; hbert convert makes an HBERT of it"),
        ({"model_type": "hbert", "architectures": ["HBertForDreams"]}, "holds a HBertForDreams, which"),
        ({"model_type": "hbert", "architectures": ["HBertModel"]}, "has no weights; allowed: model.safetensors"),
    ],
)
def test_folders_that_cannot_be_exported(tmp_path, capsys, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["export", str(tmp_path), str(tmp_path / "model.onnx")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "model.onnx").exists()


def test_incomplete_weights_are_not_exported(tmp_path, capsys):
    small_masked_lm(layer_types="AS").save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.ffn.fc1" not in name}
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model.onnx")]) == 2
    assert "the weights are incomplete (2 are missing, such as hbert.layers.1.ffn.fc1.bias)" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


class FirstOutput(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask)[0]


@pytest.mark.parametrize(
    "kind",
    [
        HBertModel,
        HBertForMaskedLM,
        HBertForSequenceClassification,
        HBertForTokenClassification,
        HBertForQuestionAnswering,
    ],
)
def test_the_packed_form_exports_for_any_mask_and_needs_no_op_of_ours(kind):
    model = small_model(kind, layer_types="AS", conv_kernel_size=3, num_labels=3)
    ids, mask = batch()
    program = torch.export.export(FirstOutput(model), (ids, mask))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.argsort.stable" in names and not [name for name in names if "hbert" in name]
    for seed in range(3):
        ids, mask = batch(seed=seed)
        torch.testing.assert_close(program.module()(ids, mask), model(ids, mask)[0], rtol=1e-11, atol=1e-12)
