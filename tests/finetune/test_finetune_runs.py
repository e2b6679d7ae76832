"""Kinds of runs of `hbert finetune`: other models, other labels, stopping, overwriting, failing."""

import json
import shutil

import datasets
import pytest
import torch
from finetune_helpers import (
    FAST,
    LENGTH,
    VOCAB,
    bert,
    hbert_model,
    predictions,
    results,
    save_checkpoint,
    toy_rows,
    write_jsonl,
    write_tsv,
)
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BartConfig, BartForConditionalGeneration, pipeline

from hbert.finetune import training
from hbert.finetune.examples import LabelSet
from hbert.finetune.models import load_new_classifier


@pytest.fixture
def short(tmp_path_factory):
    """Flags of a file of few texts, for runs that need not learn."""
    path = write_tsv(tmp_path_factory.mktemp("short") / "all.tsv", toy_rows(48, seed=0), header=("label", "text"))
    return [*(f"--{split}={path}" for split in ("train", "valid", "test")), *FAST, "--epochs", 1]


@pytest.fixture
def unlimited_tokenizer(hbert_folder, tmp_path):
    """A checkpoint whose tokenizer does not say how much the model reads."""
    folder = shutil.copytree(hbert_folder, tmp_path / "unlimited")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_shuffled_labels_are_not_learned(hbert, hbert_folder, tmp_path):
    flags = []
    for number, split in enumerate(("train", "valid", "test")):
        rows = toy_rows(240, seed=number)
        labels = [label for label, _ in toy_rows(240, seed=number + 10)]
        shuffled = [(label, text) for label, (_, text) in zip(labels, rows, strict=True)]
        flags += [f"--{split}", write_tsv(tmp_path / f"{split}.tsv", shuffled, header=("label", "text"))]
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *flags, "--out", tmp_path / "out", *FAST)
    assert status == 0, stderr
    assert results(tmp_path / "out")["test"]["accuracy"]["mean"] < 0.5


def test_a_bert_of_transformers(hbert, bert_folder, toy, tmp_path):
    out = tmp_path / "out"
    status, _, stderr = hbert(
        "finetune", "--model", bert_folder, *toy, "--out", out, *FAST, "--lr", 1e-3, "--epochs", 6, "--seeds", 1
    )
    assert status == 0, stderr
    assert results(out)["test"]["accuracy"]["mean"] > 0.9
    assert "import hbert" not in (out / "README.md").read_text()
    # Its result is a checkpoint to fine-tune again: the head stays where it has as many labels.
    words = ["--model", out, *toy, "--out", tmp_path / "two", *FAST, "--epochs", 1, "--lr", 1e-9, "--seeds", 1]
    status, _, stderr = hbert("finetune", *words)
    assert status == 0, stderr
    assert results(tmp_path / "two")["test"] == results(out)["test"]


@pytest.mark.parametrize("build", [hbert_model, bert])
def test_a_head_is_kept_for_the_same_labels_and_else_all_of_it_is_new(build, tmp_path):
    first = load_new_classifier(str(save_checkpoint(build(), tmp_path / "a")), LabelSet(("a", "b"), False), {}, seed=0)
    first.save_pretrained(tmp_path / "b")
    before = first.state_dict()

    def new_tensors(*labels):
        model = load_new_classifier(str(tmp_path / "b"), LabelSet(labels, False), {}, seed=1)
        assert model.config.id2label == dict(enumerate(labels)) and model.dtype == torch.float32
        return {
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, before[name]) and name.endswith("weight")
        }

    head = {name for name in before if name.startswith("classifier.") and name.endswith("weight")}
    assert new_tensors("a", "b") == set()
    assert new_tensors("b", "a") == new_tensors("c", "d") == new_tensors("a", "b", "c") == head


def test_a_model_that_returns_more_than_logits(hbert, short, tmp_path):
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
             {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = BartConfig(vocab_size=VOCAB, d_model=16, max_position_embeddings=LENGTH, **sizes, **ids)
    folder = save_checkpoint(BartForConditionalGeneration(config), tmp_path / "bart")
    status, _, stderr = hbert("finetune", "--model", folder, *short, "--out", tmp_path / "out")
    assert status == 0, stderr
    assert results(tmp_path / "out")["model"]["class"] == "BartForSequenceClassification"


def test_a_model_below_naive_bayes_is_a_failure(hbert, hbert_folder, toy, tmp_path):
    out, line = tmp_path / "out", "Below naive Bayes in accuracy: pretraining or fine-tuning has failed"
    words = ["--model", hbert_folder, *toy, "--out", out, *FAST, "--epochs", 1, "--lr", 1e-9]
    status, stdout, stderr = hbert("finetune", *words)
    assert status == 0, stderr
    record = results(out)
    assert record["test"]["accuracy"]["mean"] < record["floor"]["test"]["accuracy"]
    assert record["failure"] == line
    assert line in stdout.splitlines()
    assert f"**{line}.**" in (out / "README.md").read_text(encoding="utf-8").splitlines()


def test_patience_ends_a_run(hbert, hbert_folder, short, tmp_path):
    words = [*short, "--out", tmp_path / "out", "--lr", 1e-9, "--epochs", 9, "--patience", 2]
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *words)
    assert status == 0, stderr
    (run,) = results(tmp_path / "out")["runs"]
    assert len(run["epochs"]) == 3 and run["best_epoch"] == 1


def test_the_weights_are_those_of_the_best_epoch(hbert, hbert_folder, short, tmp_path, monkeypatch):
    out, measured = tmp_path / "out", []
    evaluate = training._LengthTrainer.evaluate

    def evaluated(self, *args, **kwargs):
        measured.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(training._LengthTrainer, "evaluate", evaluated)
    monkeypatch.setattr(training, "_measure", lambda *_: {"accuracy": 1 / len(measured)})
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *short, "--out", out, "--epochs", 2)
    assert status == 0, stderr
    assert results(out)["runs"][0]["best_epoch"] == 1
    saved, (first, second) = load_file(out / "model.safetensors"), measured
    assert saved.keys() == first.keys()
    assert all(torch.equal(saved[name], first[name]) for name in saved)
    assert not torch.equal(first["classifier.out.weight"], second["classifier.out.weight"])


def test_several_labels_and_pairs(hbert, hbert_folder, tmp_path):
    """Two texts a row; a row has the labels of both."""
    flags = ["--multi-label", "--text-column", "one", "--text-pair-column", "two", "--label-column", "tags"]
    for number, (split, count) in enumerate({"train": 320, "valid": 80, "test": 80}.items()):
        halves = [toy_rows(count, seed=number), toy_rows(count, seed=number + 10)]
        rows = [
            {"one": a[:40], "two": b[:40], "tags": sorted({x, y} - {"odd"})}
            for (x, a), (y, b) in zip(*halves, strict=True)
        ]
        flags += [f"--{split}", write_jsonl(tmp_path / f"{split}.jsonl", rows)]
    out = tmp_path / "out"
    words = ["--out", out, *FAST, "--epochs", 8]
    status, stdout, stderr = hbert("finetune", "--model", hbert_folder, *flags, *words)
    assert status == 0, stderr
    record = results(out)
    assert record["settings"]["metric"] == "micro_f1" and record["floor"] is None
    assert record["test"]["micro_f1"]["mean"] > 0.75 and "exact_match" in stdout
    assert not (out / "confusion.png").exists()
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.problem_type == "multi_label_classification"
    cells = predictions(out / "predictions" / "seed-0.tsv")
    assert {"bad,good", "", "bad"} <= set(cells["label"])
    assert all(
        len(p.split(",")) == len(q.split(",")) for p, q in zip(cells["prediction"], cells["probability"], strict=True)
    )
    status, _, stderr = hbert(
        *["predict", "--model", out, "--input", tmp_path / "test.jsonl", "--out", tmp_path / "p.tsv"],
        *["--text-column", "one", "--text-pair-column", "two", "--dtype", "fp32"],
    )
    assert status == 0, stderr
    assert predictions(tmp_path / "p.tsv") == {name: cells[name] for name in ("prediction", "probability")}


def test_one_label_that_texts_have_or_have_not(hbert, hbert_folder, tmp_path):
    rows = [{"text": text, "label": ["good"] * (label == "good")} for label, text in toy_rows(32, seed=0)]
    flags = [f"--{split}={write_jsonl(tmp_path / 'all.jsonl', rows)}" for split in ("train", "valid", "test")]
    words = ["--multi-label", *flags, "--out", tmp_path / "out", *FAST, "--epochs", 1]
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *words)
    assert status == 0, stderr
    assert results(tmp_path / "out")["labels"] == ["good"]
    assert predictions(tmp_path / "out" / "predictions" / "seed-0.tsv")["label"] == ["".join(r["label"]) for r in rows]


def test_long_texts_are_truncated_and_counted(hbert, hbert_folder, tmp_path):
    rows = [("good", "happy " * 40), ("bad", "sad"), ("good", "happy boat"), ("bad", "dark " * 30)]
    path = write_tsv(tmp_path / "all.tsv", rows, header=("label", "text"))
    flags = [f"--{split}={path}" for split in ("train", "valid", "test")]
    words = ["--out", tmp_path / "out", "--epochs", 1, "--dtype", "fp32"]
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *flags, *words)
    assert status == 0, stderr
    assert stderr.count("truncated to 24 tokens: 2 of train, 2 of valid, 2 of test") == 1
    assert results(tmp_path / "out")["data"]["test"]["truncated"] == 2
    assert results(tmp_path / "out")["data"]["test"]["tokens"] == 24 + 3 + 4 + 24
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None and saved["padding"] is None


def test_the_folder_keeps_the_length_of_its_training(hbert, short, unlimited_tokenizer, tmp_path):
    out, texts = tmp_path / "out", [text for _, text in toy_rows(48, seed=0)]
    status, _, stderr = hbert("finetune", "--model", unlimited_tokenizer, *short, "--out", out, "--max-length", 6)
    assert status == 0, stderr
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    words = ["--input", tmp_path / "texts.txt", "--out", tmp_path / "p.tsv", "--dtype", "fp32"]
    status, _, stderr = hbert("predict", "--model", out, *words)
    assert status == 0, stderr
    trained = predictions(out / "predictions" / "seed-0.tsv")
    assert predictions(tmp_path / "p.tsv") == {name: trained[name] for name in ("prediction", "probability")}
    classify = pipeline("text-classification", str(out))
    assert [entry["label"] for entry in classify(texts, truncation=True)] == trained["prediction"]


def test_a_data_set_by_name(hbert, hbert_folder, tmp_path, monkeypatch):
    """A local data set: its splits have their usual names, its labels the order that it declares."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ["odd", "good", "bad"]
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = toy_rows(24, seed=0)
        columns = {"sentence": [t for _, t in rows], "label": [names.index(label) for label, _ in rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    words = ["--dataset", tmp_path / "data", "--text-column", "sentence", *FAST, "--epochs", 1]
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *words, "--out", tmp_path / "out")
    assert status == 0, stderr
    assert results(tmp_path / "out")["labels"] == names
    assert predictions(tmp_path / "out" / "predictions" / "seed-0.tsv")["label"] == [a for a, _ in rows]
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *words, "--out", tmp_path / "b", "--test", "dev")
    assert status == 2 and "no split 'dev'; it has: train, validation, test" in stderr


def test_overwriting(hbert, hbert_folder, short, tmp_path):
    out = tmp_path / "out"
    words = ["finetune", "--model", hbert_folder, *short, "--out", out]
    assert hbert(*words)[0] == 0
    first = load_file(out / "model.safetensors")
    status, _, stderr = hbert(*words, "--seeds", 7)
    assert status == 2 and "exists; choose another folder, or replace it with --overwrite" in stderr
    assert hbert(*words, "--seeds", 7, "--overwrite")[0] == 0
    assert results(out)["settings"]["seeds"] == [7]
    second = load_file(out / "model.safetensors")
    assert not torch.equal(first["classifier.out.weight"], second["classifier.out.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_leaves_nothing(hbert, hbert_folder, short, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["finetune", "--model", hbert_folder, *short, "--out", out]
    assert hbert(*words)[0] == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    measured = training._measure

    def interrupted(*args):
        if len(list(tmp_path.glob(".out.*/run-*/*"))) > 0:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(training, "_measure", interrupted)
    assert hbert(*words, "--overwrite", "--seeds", 0, 1)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_loss_that_is_not_a_number(hbert, hbert_folder, short, tmp_path):
    words = [*short, "--out", tmp_path / "out", "--epochs", 2, "--lr", 1e30, "--warmup", 0]
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *words)
    assert status == 2 and "the training loss is nan" in stderr and "smaller --lr" in stderr
    assert not list(tmp_path.iterdir())


def test_bf16_trains(hbert, hbert_folder, toy, tmp_path):
    out = tmp_path / "out"
    status, _, stderr = hbert("finetune", "--model", hbert_folder, *toy, "--out", out, *FAST, "--dtype", "bf16")
    assert status == 0, stderr
    assert results(out)["dtype"] == "bf16" and results(out)["test"]["accuracy"]["mean"] > 0.9
    assert load_file(out / "model.safetensors")["classifier.out.weight"].dtype == torch.float32
