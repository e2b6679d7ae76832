"""`hbert finetune`: one run of everything, and what it leaves."""

import numpy as np
import pytest
import torch
from finetune_helpers import FAST, predictions, results, toy_rows
from transformers import AutoTokenizer, pipeline

from hbert import cli
from hbert.finetune.metrics import classification_metrics

FILES = {
    "README.md",
    "config.json",
    "confusion.png",
    "model.safetensors",
    "predictions",
    "results.json",
    "tensorboard",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def learned(hbert_folder, toy, tmp_path_factory):
    """The result of two learning rates and two seeds: the folder, and what was evaluated in which order."""
    out = tmp_path_factory.mktemp("learned") / "out"
    torch.set_num_threads(1)
    words = ["finetune", "--model", hbert_folder, *toy, "--out", out, *FAST]
    words += ["--lr", "1e-5", "2e-3", "--seeds", "3", "4"]
    assert cli.main([str(word) for word in words]) == 0
    return out


def test_a_separable_task_is_learned(learned):
    record = results(learned)
    assert record["test"]["accuracy"]["mean"] > 0.9
    assert {path.name for path in learned.iterdir()} == FILES
    assert not list(learned.parent.glob(".*"))


def test_the_sweep_is_chosen_on_validation_and_tested_once(learned):
    record = results(learned)
    runs = [(run["lr"], run["seed"]) for run in record["runs"]]
    assert runs == [(1e-5, 3), (2e-3, 3), (2e-3, 4)]
    assert record["lr"] == 2e-3
    assert record["runs"][0]["validation"]["accuracy"] < record["runs"][1]["validation"]["accuracy"]
    assert sorted(path.name for path in (learned / "predictions").iterdir()) == [
        "naive-bayes.tsv",
        "seed-3.tsv",
        "seed-4.tsv",
    ]
    for run in record["runs"]:
        scores = [epoch["accuracy"] for epoch in run["epochs"]]
        assert run["best_epoch"] == 1 + scores.index(max(scores)) and len(scores) == 4
        assert run["validation"]["accuracy"] == max(scores)


def test_scores_are_those_of_the_predictions(learned, toy):
    record = results(learned)
    truth = [label for label, _ in toy_rows(120, seed=2)]
    values = []
    for seed in (3, 4):
        cells = predictions(learned / "predictions" / f"seed-{seed}.tsv")
        assert cells["label"] == truth
        assert all(1 / 3 <= float(p) <= 1 for p in cells["probability"])
        values.append(np.mean([a == b for a, b in zip(cells["label"], cells["prediction"], strict=True)]))
    accuracy = record["test"]["accuracy"]
    assert accuracy["values"] == pytest.approx(values)
    assert accuracy["mean"] == pytest.approx(np.mean(values))
    assert accuracy["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    best = record["settings"]["seeds"].index(record["best_seed"])
    confusion = np.array(record["best_seed_test"]["confusion"])
    assert confusion.sum() == 120
    assert classification_metrics(confusion)["accuracy"] == pytest.approx(values[best])
    assert record["floor"]["test"]["accuracy"] > 0.9


def test_the_folder_is_a_model_of_transformers(learned, toy):
    classify = pipeline("text-classification", str(learned))
    cells = predictions(learned / "predictions" / f"seed-{results(learned)['best_seed']}.tsv")
    texts = [text for _, text in toy_rows(120, seed=2)]
    found = classify(texts)
    assert [entry["label"] for entry in found] == cells["prediction"]
    probabilities = [float(p) for p in cells["probability"]]
    assert [entry["score"] for entry in found] == pytest.approx(probabilities, abs=1e-4)
    assert classify.model.config.id2label == {0: "bad", 1: "good", 2: "odd"}


def test_card_and_picture(learned):
    card = (learned / "README.md").read_text(encoding="utf-8")
    record = results(learned)
    for text in ("HBertForSequenceClassification", "seed 4", "naive Bayes", "0.002", "train.tsv", "import hbert"):
        assert text in card
    assert "architectures" not in record["model"]["config"] and "HBertForMaskedLM" not in card
    assert record["failure"] is None and "failed" not in card
    for split in record["data"].values():
        assert split["sha256"][:16] in card and split["truncated"] == 0
    picture = (learned / "confusion.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
    events = list((learned / "tensorboard").glob("*/events*"))
    assert len(events) == 3 and all(path.stat().st_size for path in events)


def test_the_same_seed_gives_the_same_bytes(hbert, hbert_folder, toy, learned, tmp_path):
    out = tmp_path / "again"
    words = [*toy, "--out", out, *FAST, "--seeds", 3, "--set", "hidden_dropout_prob=0.0"]
    status, stdout, stderr = hbert("finetune", "--model", hbert_folder, *words)
    assert status == 0, stderr
    assert "accuracy" in stdout and f"seed 3 in {out}" in stdout
    assert stderr.count("validation loss") == 4
    assert predictions(out / "predictions" / "seed-3.tsv") == predictions(learned / "predictions" / "seed-3.tsv")
    mine, theirs = (results(folder)["runs"] for folder in (out, learned))
    assert mine[0]["epochs"] == theirs[1]["epochs"]
    if results(learned)["best_seed"] == 3:
        assert (out / "model.safetensors").read_bytes() == (learned / "model.safetensors").read_bytes()


def test_tokenizer_comes_along(learned, hbert_folder):
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (learned, hbert_folder))
    assert mine("happy boat")["input_ids"] == theirs("happy boat")["input_ids"]
