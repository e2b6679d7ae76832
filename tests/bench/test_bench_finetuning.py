"""The queue of fine-tuning experiments: names, choices, records, tables."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser

import pytest
from html_page import Page
from rich.console import Console
from transformers import BertConfig

from bench.finetuning import __main__ as queue
from bench.finetuning import plan, report, store, times
from bench.pretraining import plan as pretraining
from hbert import HBertConfig
from hbert.data.tokenizer import SPECIAL_TOKENS, save_tokenizer, tokenizer_from_vocabulary
from hbert.errors import HbertError
from hbert.finetune.finetune_command import add_parser

LABELS = ["x", "y"] * 50
PIECES = [*SPECIAL_TOKENS, "the", "sea", "boat"]
_SIZES = {"vocab_size": len(PIECES), "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16}
CONFIGS = {
    "b": BertConfig(**_SIZES, num_hidden_layers=2, intermediate_size=64),
    "g": HBertConfig(**_SIZES, layer_types="AS", positions="learned"),
}
TIMES = {
    "machine": {"cpu": "a processor"},
    "threads": 1,
    "cpu_capability": "avx2",
    "software": {"revision": "abc"},
    "date": "2026-11-30",
    "texts": 100,
    "tokens": 950,
    "milliseconds": {"b": [2.0, 2.1, 1.9], "g": [1.0, 1.1, 0.9]},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results")
    return tmp_path


def finish(run: plan.Run, folder, right: int, validation: float = 0.5) -> None:
    """A run that is right about the first ``right`` of 100 texts, and about no other."""
    out = folder / run.name
    (out / "predictions").mkdir(parents=True)
    wrong = {"x": "y", "y": "x"}
    rows = [f"{label}\t{label if i < right else wrong[label]}\t0.9" for i, label in enumerate(LABELS)]
    text = "\n".join(["label\tprediction\tprobability", *rows]) + "\n"
    for name in (f"seed-{run.seed}.tsv", "naive-bayes.tsv"):
        (out / "predictions" / name).write_text(text)
    scores = {name: {"mean": right / 100} for name in ("accuracy", "macro_f1", "mcc")}
    record = {
        "settings": {"model": "/home/me/runs/b", "train": "/home/me/train.tsv", "out": "/home/me/out", "dataset": None},
        "data": {"train": {"source": "/home/me/train.tsv"}},
        "validation": {"accuracy": {"mean": validation}},
        "dtype": "bf16",
        "test": scores,
        "floor": {"test": {name: 0.25 for name in scores}},
        "best_seed_test": {"confusion": [[1, 2], [3, 4]]},
        "labels": ["x", "y"],
        "model": {"config": CONFIGS[run.model].to_dict()},
    }
    (out / "results.json").write_text(json.dumps(record))
    store.keep(run, out)


def finish_sweep(model: str, folder, right: int) -> None:
    """A sweep whose best rate is the one in the middle."""
    for run, validation in zip(store.sweep("rotten", model), (0.6, 0.7, 0.65), strict=True):
        finish(run, folder, right, validation)


def finish_two_models(folder) -> None:
    """Three seeds each: b is right about 60 to 62 texts, g about 80 to 82, in half the time."""
    store.keep_times("rotten", TIMES)
    for model, right in (("b", 60), ("g", 80)):
        finish_sweep(model, folder, right)
        for seed in (1, 2):
            finish(plan.Run("rotten", model, seed), folder, right + seed)


def test_the_plan():
    runs = plan.runs(tuple(plan.TASKS))
    assert len({run.name for run in runs}) == len(runs)
    assert {run.seed for run in runs} == set(plan.SEEDS[1:])
    for task in plan.TASKS:
        assert {run.model for run in runs if run.task == task} == set(plan.models(task))
        # Nobody is without the one that it is compared with.
        assert {plan.baseline(model) for model in plan.models(task)} <= set(plan.models(task))
        assert {plan.pretrained(model) for model in plan.models(task)} <= {run.name for run in pretraining.runs()}


def test_the_validation_split_chooses_the_rate_and_the_test_split_does_not(results):
    first, best, last = store.sweep("rotten", "g")
    assert store.learning_rate("rotten", "g") is None and store.chosen("rotten", "g") == []
    for run, right, validation in ((first, 90, 0.6), (best, 70, 0.7), (last, 80, 0.65)):
        assert not store.is_done(run)
        finish(run, results, right, validation)
        assert store.is_done(run)
    assert store.learning_rate("rotten", "g") == best.lr
    assert store.chosen("rotten", "g") == [best]
    finish(plan.Run("rotten", "g", 2), results, 60)
    assert [run.seed for run in store.chosen("rotten", "g")] == [0, 2]


def test_a_record_names_no_place_of_this_machine(results):
    run = store.sweep("rotten", "b")[0]
    finish(run, results, 50)
    assert "/home" not in (store.folder(run) / "results.json").read_text()
    assert store.record(run)["settings"]["model"] == "b"
    assert store.record(run)["data"]["train"]["source"] == "train.tsv"


def test_a_record_is_small(results):
    run = store.sweep("rotten", "b")[0]
    finish(run, results, 50)
    assert store.record(run)["best_seed_test"] == {}
    assert [file.name for file in store.predictions(run).parent.iterdir()] == ["seed-0.tsv"]


def test_commands_are_understood(tmp_path):
    parser = ArgumentParser()
    add_parser(parser.add_subparsers(), "")
    words = queue.command(
        plan.Run("emotion", "g", 1), 2e-4, tmp_path / "models", tmp_path / "emotion", tmp_path / "out"
    )
    args = parser.parse_args(words[3:])
    assert (args.lr, args.seeds, args.epochs, args.patience) == ([2e-4], [1], 10, 3)
    assert args.columns == ["label", "text"]
    assert args.model == str(tmp_path / "models" / "main-g-2")
    assert args.test == str(tmp_path / "emotion" / "test.tsv")


def test_the_tables(results):
    finish_two_models(results)
    text = report.report()
    assert "### rotten" in text and "### emotion" not in text
    assert "| b | 3 | 0.0002 | 0.6100 ± 0.0100 | 0.6100 ± 0.0100 | 0.6100 ± 0.0100 | 2.000 |  |" in text
    assert "| 0.8100 ± 0.0100 | 1.000 | 2.00 [1.91, 2.11] |" in text
    assert "| naive Bayes |  |  | 0.2500 | 0.2500 | 0.2500 |  |  |" in text
    assert "threads: 1, 3 rounds by turns, 100 texts of 9.5 tokens; a processor, avx2; commit abc" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| g - b |")]
    # 20 texts that only g has right in each seed: 2 / 2^20.
    assert "| +0.2000 | [+0.12" in line and line.endswith("| 1.9e-06, 1.9e-06, 1.9e-06 |")


def test_models_are_compared_at_the_papers_rate_too(results):
    finish_two_models(results)
    table = report.report().partition("| at the paper's 5e-05 | accuracy |")[2].partition("\n\n")[0].splitlines()
    assert table[2] == "| b | 0.6000 | 0.6000 | 0.6000 |  |  |  |"
    assert table[3].startswith("| g | 0.8000 | 0.8000 | 0.8000 | +0.2000 | [+0.12") and len(table) == 4


def test_a_sweep_that_is_not_complete_is_shown_without_scores(results):
    first, second, last = store.sweep("rotten", "g")
    for run, validation in ((first, 0.6), (last, 0.7)):
        finish(run, results, 50, validation)
    text = report.report()
    assert "| validation accuracy at | 5e-05 | 0.0005 |" in text and "| g | 0.6000 | 0.7000 |" in text
    assert "naive Bayes" not in text
    finish(second, results, 50, 0.65)
    # The best rate is the highest: the next one is still to come.
    assert [run.lr for run in store.sweep("rotten", "g")] == [5e-5, 2e-4, 5e-4, 1e-3]
    assert "naive Bayes" not in report.report()


@pytest.fixture
def timed(results, monkeypatch):
    """Two models with finished runs, a test split of three texts."""
    monkeypatch.setattr(times, "ROUNDS", 4)
    finish_sweep("b", results, 60)
    finish_sweep("g", results, 80)
    (results / "tasks" / "rotten").mkdir(parents=True)
    (results / "tasks" / "rotten" / "test.tsv").write_text("x\tthe sea\ny\tthe boat the sea\nx\tsea\n")
    return results


def test_models_are_timed_by_turns_on_the_test_split(timed):
    CONFIGS["g"].save_pretrained(timed / "models" / "main-g-2")
    save_tokenizer(tokenizer_from_vocabulary(PIECES), timed / "models" / "main-g-2")
    found = times.measure("rotten", timed / "tasks", timed / "models", Console(quiet=True))
    assert (found["texts"], found["tokens"]) == (3, 7 + 2 * 3)
    assert {name: len(rounds) for name, rounds in found["milliseconds"].items()} == {"b": 4, "g": 4}
    assert all(value > 0 for rounds in found["milliseconds"].values() for value in rounds)
    store.keep_times("rotten", found)
    assert store.times("rotten") == found and "Times: `python -m bench.finetuning time`" in report.report()


def test_times_need_the_tokenizer_of_a_model(timed):
    with pytest.raises(HbertError, match="none of main-b-2, .*: their tokenizer is needed"):
        times.measure("rotten", timed / "tasks", timed / "models", Console(quiet=True))


def test_runs_wait_for_sweeps_and_for_models(results, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(queue, "execute", lambda run, options, console: asked.append(run.name))
    (tmp_path / "tasks" / "rotten").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["x", "run", "--tasks", str(tmp_path / "tasks"), "--only", "rotten-g-*"])
    assert queue.main() == 1
    assert asked == ["rotten-g-5e-05", "rotten-g-1", "rotten-g-2"]


def test_the_page_has_accuracy_against_time(results):
    finish_two_models(results)
    path = report.write_page(results / "page")
    page = Page(path.read_text())
    page.check_self_contained()
    page.check_figures()
    assert page.values("alt") == ["rotten: test accuracy against the time of a text"]
    assert "**" not in page.text and "`" not in page.text
    assert page.row("b")[:4] == ["b", "3", "0.0002", "0.6100 ± 0.0100"]
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".html", ".png", ".png"]


def test_models_below_naive_bayes_are_named(results):
    finish_sweep("b", results, 26)
    finish_sweep("g", results, 24)
    text = report.report()
    assert "Below naive Bayes, so pretraining has failed for this task: g." in text
    assert "Trained and tested in bf16." in text


def test_models_of_an_hour_are_compared_with_each_other():
    assert {plan.baseline(name) for name in plan.MODELS} == {"b"}
    assert {plan.baseline(name) for name in plan.HOUR_MODELS} == {"b60"}
    assert plan.pretrained("g60") == "hour-g-0" and plan.pretrained("g") == "main-g-2"


def test_points_are_means_over_seeds_with_their_deviation(results):
    store.keep_times("rotten", TIMES)
    finish_sweep("b", results, 60)
    for seed, right in ((1, 64), (2, 68)):
        finish(plan.Run("rotten", "b", seed), results, right)
    chart = report.accuracy_chart("rotten", {"b": store.chosen("rotten", "b")})
    (line,) = chart.lines
    assert (line.x, line.y) == ([pytest.approx(2.0)], [pytest.approx(0.64)])
    assert (line.low, line.high) == ([pytest.approx(0.60)], [pytest.approx(0.68)])
    assert chart.marks == {"naive Bayes 0.250": 0.25}
