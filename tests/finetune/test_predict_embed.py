"""`hbert predict` and `hbert embed`: results in the order of the input, whatever the batches."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_helpers import PIECES, bert, hbert_model, predictions, save_checkpoint, toy_rows, write_tsv
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)

from hbert.errors import HbertError
from hbert.finetune import embed_command, stream
from hbert.finetune.examples import LabelSet
from hbert.finetune.models import load_encoder, load_new_classifier

NAMES = {0: "bad", 1: "good", 2: "odd"}
TEXTS = [text for _, text in toy_rows(37, seed=5)] + ["", "happy " * 50]


@pytest.fixture(scope="module", params=["hbert", "bert"])
def classifier(request, tmp_path_factory, hbert_folder, bert_folder):
    """A checkpoint with a random head whose decisions differ."""
    folder = {"hbert": hbert_folder, "bert": bert_folder}[request.param]
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder, id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # biases would decide alone
                parameter.add_(0.3 * torch.randn(parameter.shape))
    out = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A file of 39 texts, read in pieces of 8."""
    monkeypatch.setattr(stream, "PIECE", 8)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def one_by_one(model, tokenizer, read):
    with torch.no_grad():
        inputs = [tokenizer(t, truncation=True, max_length=24, return_tensors="pt") for t in TEXTS]
        return torch.stack([read(model(**entry)) for entry in inputs])


def test_predictions(hbert, classifier, texts, tmp_path):
    words = ["predict", "--model", classifier, "--input", texts, "--dtype", "fp32", "--batch-tokens", 60]
    for suffix in ("tsv", "csv", "jsonl"):
        status, stdout, stderr = hbert(*words, "--out", tmp_path / f"out.{suffix}")
        assert status == 0, stderr
    assert "39 texts" in stdout and "tokens/s" in stdout
    assert "1 text truncated to 24 tokens" in stdout and "1 text is empty; its result means" in stdout
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    expected = one_by_one(model, tokenizer, lambda out: out.logits[0].softmax(-1))
    cells = predictions(tmp_path / "out.tsv")
    assert cells["prediction"] == [NAMES[k] for k in expected.argmax(1).tolist()]
    assert len(set(cells["prediction"])) > 1
    assert [float(p) for p in cells["probability"]] == pytest.approx(expected.max(1)[0].tolist(), abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == cells["prediction"]
    table = (tmp_path / "out.csv").read_text().splitlines()
    assert table == [line.replace("\t", ",") for line in (tmp_path / "out.tsv").read_text().splitlines()]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings(hbert, classifier, texts, tmp_path, pooling):
    words = ["embed", "--model", classifier, "--input", texts, "--dtype", "fp32", "--pooling", pooling]
    for out, extra in (("a.npy", []), ("b.safetensors", ["--normalize"])):
        status, stdout, stderr = hbert(*words, "--out", tmp_path / out, *extra)
        assert status == 0 and "39 texts" in stdout, stderr
    model = AutoModel.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    expected = one_by_one(
        model,
        tokenizer,
        lambda out: out.last_hidden_state[0].mean(0) if pooling == "mean" else out.last_hidden_state[0, 0],
    )
    vectors = np.load(tmp_path / "a.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-4)
    (name,) = (tensors := load_file(tmp_path / "b.safetensors"))
    assert name == "embeddings" and (tmp_path / "b.safetensors").stat().st_size % 8 == 0
    unit = torch.nn.functional.normalize(expected, dim=1)
    np.testing.assert_allclose(tensors[name], unit.numpy(), atol=1e-4)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_vectors_are_closed_before_they_take_their_name(tmp_path, monkeypatch, suffix):
    """As Windows wants it."""
    replace, path = os.replace, tmp_path / f"a{suffix}"

    def replace_closed(source, target):
        assert str(source) not in Path("/proc/self/maps").read_text()
        assert str(source) not in [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_closed)
    rows = np.arange(15, dtype=np.float32).reshape(5, 3)
    with embed_command.writing_rows(path, 5, 3) as write:
        write(rows[:2])
        write(rows[2:])
    found = np.load(path) if suffix == ".npy" else load_file(path)["embeddings"]
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("count", [1, 3])
def test_texts_that_change_while_they_are_read(tmp_path, count):
    with pytest.raises(HbertError, match=f"the input has changed while it was read: 2 texts, then {count}"):
        with embed_command.writing_rows(tmp_path / "a.npy", 2, 3) as write:
            write(np.zeros((count, 3), np.float32))
    assert not list(tmp_path.iterdir())


def test_a_masked_lm_checkpoint_embeds_but_does_not_predict(hbert, hbert_folder, texts, tmp_path):
    status, _, stderr = hbert("embed", "--model", hbert_folder, "--input", texts, "--out", tmp_path / "a.npy")
    assert status == 0, stderr
    words = ["predict", "--model", hbert_folder, "--input", texts, "--out", tmp_path / "a.tsv"]
    status, _, stderr = hbert(*words)
    assert status == 2 and "has no trained classification head" in stderr
    assert not (tmp_path / "a.tsv").exists()


def test_bf16(hbert, classifier, texts, tmp_path):
    for dtype in ("fp32", "bf16"):
        words = ["--model", classifier, "--input", texts, "--out", tmp_path / f"{dtype}.npy", "--dtype", dtype]
        assert hbert("embed", *words, "--normalize")[0] == 0
    full, half = (np.load(tmp_path / f"{dtype}.npy") for dtype in ("fp32", "bf16"))
    assert 0 < np.abs(full - half).max() < 0.1


def test_optimized_for_serving(hbert, classifier, texts, tmp_path):
    words = ["--model", classifier, "--input", texts]
    for name, extra in (
        ("plain", ["--dtype", "fp32"]),
        ("fp32", ["--optimize", "fp32"]),
        ("int8", ["--optimize", "int8"]),
    ):
        status, _, stderr = hbert("embed", *words, "--out", tmp_path / f"{name}.npy", "--normalize", *extra)
        assert status == 0, stderr
    plain, fp32, int8 = (np.load(tmp_path / f"{name}.npy") for name in ("plain", "fp32", "int8"))
    np.testing.assert_allclose(fp32, plain, atol=1e-4)
    assert 0 < np.abs(int8 - plain).max() < 0.1
    assert hbert("predict", *words, "--out", tmp_path / "a.tsv", "--optimize", "int8")[0] == 0
    assert len(predictions(tmp_path / "a.tsv")["prediction"]) == len(TEXTS)


def test_int8_stays_on_the_cpu_where_there_is_a_gpu(hbert, classifier, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("hbert.precision.device", lambda: torch.device("meta"))
    words = ["--model", classifier, "--input", texts, "--optimize"]
    for command, name in (("embed", "a.npy"), ("predict", "a.tsv")):
        status, _, stderr = hbert(command, *words, "int8", "--out", tmp_path / name)
        assert status == 0, stderr


def test_existing_files_and_interruptions(hbert, classifier, texts, tmp_path, monkeypatch):
    out = tmp_path / "out.tsv"
    out.write_text("mine")
    words = ["predict", "--model", classifier, "--input", texts, "--out", out]
    status, _, stderr = hbert(*words)
    assert status == 2 and "exists; choose another name, or --overwrite" in stderr

    run, calls = stream.Runner.run, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(stream.Runner, "run", interrupted)
    assert hbert(*words, "--overwrite")[0] == 130
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tsv", "texts.txt"]
    monkeypatch.setattr(stream.Runner, "run", run)
    assert hbert(*words, "--overwrite")[0] == 0
    assert len(predictions(out)["prediction"]) == 39


def test_bad_input(hbert, hbert_folder, tmp_path):
    table = write_tsv(tmp_path / "a.tsv", [("good", "a")], header=("label", "text"))
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": "a"}\n{"txt": "b"}\n')
    nothing = tmp_path / "c.txt"
    nothing.write_text("")
    good = {"--model": hbert_folder, "--input": table, "--out": tmp_path / "o.npy"}
    for changes, message in (
        ({"--input": tmp_path / "none.tsv"}, "no such file"),
        ({"--input": broken}, "b.jsonl, line 2: no 'text'"),
        ({"--input": nothing}, "has no rows"),
        ({"--text-column": "b"}, "has no column 'b'; it has: 'label', 'text'"),
        ({"--out": tmp_path / "o.csv"}, "the suffix must be one of .npy, .safetensors"),
        ({"--out": tmp_path / "no" / "o.npy"}, "its folder must exist"),
        ({"--batch-tokens": 0}, "batch_tokens is 0"),
        ({"--max-length": 500}, "the model has 24 positions"),
        ({"--model": tmp_path}, "no config.json"),
    ):
        words = [word for flag in (good | changes).items() for word in flag]
        status, _, stderr = hbert("embed", *words)
        assert status == 2 and message in stderr, (message, stderr)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "b.jsonl", "c.txt"]


@pytest.mark.parametrize(("command", "out"), [("predict", "a.tsv"), ("embed", "a.npy")])
def test_weights_that_are_not_the_models(
    hbert, foreign_weights, partial_weights, surplus_weights, texts, tmp_path, command, out
):
    for folder in (foreign_weights, partial_weights, surplus_weights):
        status, _, stderr = hbert(command, "--model", folder, "--input", texts, "--out", tmp_path / out)
        assert status == 2 and f"{str(folder)!r}: the weights are incomplete or of another architecture" in stderr
        assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


@pytest.mark.parametrize(
    ("build", "surplus"),
    [(lambda: hbert_model(norm_style="pre_ln").hbert, "norm.bias"), (lambda: bert().bert, "encoder.layer.1.")],
)
def test_an_encoder_alone_with_tensors_that_have_no_place(build, surplus, tmp_path):
    build().save_pretrained(tmp_path)
    load_encoder(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    change = {"norm_style": "post_ln"} if config["model_type"] == "hbert" else {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(HbertError, match=rf"of another architecture \(.* have no place, such as {surplus}"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("kind", [BartConfig, T5Config])
def test_an_encoder_decoder_is_refused(kind, tmp_path):
    kind().save_pretrained(tmp_path)
    with pytest.raises(HbertError, match=rf"is an encoder-decoder \({kind.model_type}\); embed takes encoders"):
        load_encoder(str(tmp_path))


def test_poolers_constants_and_heads_of_other_tasks_have_no_place_and_need_none(tmp_path):
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {"embeddings.position_ids": np.arange(9), "pooler.dense.weight": np.ones((8, 8), np.float32)}
    for prefix in ("roberta.", ""):
        named = {name.replace("roberta.", prefix): tensor for name, tensor in tensors.items()}
        named |= {prefix + name: tensor for name, tensor in more.items()}
        save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
        load_encoder(str(tmp_path))
        load_new_classifier(str(tmp_path), LabelSet(("a", "b"), False), {}, seed=0)


@pytest.mark.parametrize(("command", "out"), [("predict", "a.tsv"), ("embed", "a.npy"), ("embed", "a.safetensors")])
def test_a_full_disk(hbert, classifier, tmp_path, monkeypatch, command, out):
    (tmp_path / "many.txt").write_text("happy boat\n" * 500)
    words = [command, "--model", classifier, "--input", tmp_path / "many.txt", "--out", tmp_path / out]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        status, stdout, stderr = hbert(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and f"hbert: error: {tmp_path / out} could not be written: " in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["many.txt"]


def test_vocabulary_and_separator(hbert, classifier, hbert_folder, texts, tmp_path):
    larger = save_checkpoint(hbert_model(), tmp_path / "larger", [*PIECES, "more"])
    words = ["--input", texts, "--out", tmp_path / "o.npy"]
    status, _, stderr = hbert("embed", "--model", larger, *words)
    assert status == 2 and "the vocabulary does not match" in stderr
    comma = shutil.copytree(classifier, tmp_path / "comma")
    config = json.loads((comma / "config.json").read_text())
    config["problem_type"], config["id2label"]["0"] = "multi_label_classification", "a,b"
    (comma / "config.json").write_text(json.dumps(config))
    words = ["predict", "--model", comma, "--input", texts, "--out", tmp_path / "o.tsv"]
    status, _, stderr = hbert(*words)
    assert status == 2 and "the label 'a,b' contains ','" in stderr
    assert hbert(*words, "--label-separator", ";")[0] == 0


def test_regression_models_do_not_predict_labels(hbert, texts, tmp_path):
    model = AutoModelForSequenceClassification.from_config(bert().config)
    model.config.problem_type = "regression"
    folder = save_checkpoint(model, tmp_path / "regression")
    status, _, stderr = hbert("predict", "--model", folder, "--input", texts, "--out", tmp_path / "o.tsv")
    assert status == 2 and "predicts a number, not labels" in stderr
