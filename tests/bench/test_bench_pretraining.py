"""The queue of pretraining experiments: budgets, sweeps, commands, records."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from bench.pretraining import __main__ as queue
from bench.pretraining import plan, report, store, tables
from hbert.data.ngram import NgramMarks
from hbert.data.storage import content_key, write_json
from hbert.errors import HbertError
from hbert.evaluate.marks import FILE_NAME
from hbert.evaluate.report_command import charts
from hbert.evaluate.run_folder import Evaluation, read_info
from hbert.evaluate.same_input import SameInputMarks
from hbert.evaluate.summary import Row

KEPT = store.RESULTS / "runs"
MARKS = NgramMarks(0.05, 0.15, 0.3, 0.2, 0.9, 10.0, 1234)
SAME_INPUT = SameInputMarks(0.13, 0.21, 0.31, 6.32, 0.042, 0.8, 19482)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    times = {"g-512": {"median": 0.5}, "normal-512": {"median": 2.0}}
    for group in ("arms", "start"):
        store.calibration(group).write_text(json.dumps({"step_seconds": times}))
    return tmp_path


def finish(run: plan.Run, loss: float) -> None:
    folder = store.folder(run)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "settings": {"lr": run.lr or 3e-4}}))
    found = {"loss": loss, "accuracy": 1 / loss}
    lines = [{"kind": "eval", "loss": 9.0}, {"kind": "eval", **found}, {"kind": "train", "loss": 0.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def main_run(name: str) -> plan.Run:
    return next(run for run in plan.runs() if run.name == f"main-{name}-0")


def rates(arm: plan.Arm) -> list[float | None]:
    return [run.lr for run in store.sweep(arm)]


def test_the_plan():
    names = [run.name for run in plan.runs()]
    assert len(names) == len(set(names))
    assert {f"main-{name}-0" for name in plan.ARMS} <= set(names)
    assert {f"main-{name}-{seed}" for name in plan.PAIRED for seed in (0, 1, 2)} <= set(names)
    assert all(arm.timed_as is None or plan.ARMS[arm.timed_as].group == arm.group for arm in plan.ARMS.values())


def test_a_budget_buys_calibrated_steps(results):
    assert store.steps(main_run("g")) == 2400
    assert store.steps(main_run("g02")) == 2400
    assert store.steps(main_run("gm")) == int(2400 / plan.ARMS["gm"].slower) < 2400
    assert store.steps(main_run("magneto")) == 600
    assert store.steps(main_run("b")) is None
    store.calibration("arms").unlink()
    assert store.steps(main_run("g")) is None


@pytest.mark.parametrize(
    ("losses", "more", "best"),
    [
        ({5e-4: 3.0, 1e-3: 2.0, 2e-3: 3.0}, {}, 1e-3),
        ({5e-4: 2.0, 1e-3: 2.5, 2e-3: 3.0}, {2.5e-4: 2.2}, 5e-4),
        ({5e-4: 2.0, 1e-3: 2.5, 2e-3: 3.0}, {2.5e-4: 1.9, 1.25e-4: 1.8}, 1.25e-4),
        ({5e-4: 3.0, 1e-3: 2.5, 2e-3: 2.0}, {4e-3: 1.9, 8e-3: 2.1}, 4e-3),
    ],
)
def test_a_sweep_goes_on_at_its_edges(results, losses, more, best):
    arm, run = plan.ARMS["g"], main_run("g")
    assert rates(arm) == list(losses)
    for lr, loss in {**losses, **more}.items():
        assert store.learning_rate(run) is None
        finish(plan.sweep_run(arm, lr), loss)
    assert rates(arm) == [*losses, *more]
    assert store.learning_rate(run) == best


def test_an_arm_with_a_rate_of_its_own_has_no_sweep(results):
    assert store.sweep(plan.ARMS["a"]) == [] and store.learning_rate(main_run("a")) == 1e-4


def test_commands_say_all_that_the_plan_says(results, tmp_path):
    out = tmp_path / "out"
    for run in (main_run("magneto"), plan.sweep_run(plan.ARMS["g"], 2e-3)):
        words = queue.command(run, out)
        assert words[1:4] == ["-m", "hbert", "pretrain"] and "--resume" not in words
        assert set(run.arm.flags) | set(run.arm.common) | set(plan.BLOCKS["512"]) <= set(words)
        assert words[words.index("--lr") + 1] == f"{run.lr:g}"
        assert words[words.index("--max-steps") + 1] == str(store.steps(run))
    out.mkdir()
    (out / "run.json").write_text("{}")
    assert queue.command(main_run("magneto"), out)[-1] == "--resume"


def test_a_record_names_no_place_of_this_machine(results, tmp_path):
    run, out = main_run("normal"), tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"status": "finished", "token_cache": "/home/me/.cache/tokens/abc"}))
    (out / "metrics.jsonl").write_text("")
    store.keep(run, out)
    assert store.is_done(run)
    assert json.loads((store.folder(run) / "run.json").read_text())["token_cache"] == "abc"
    assert sorted(file.name for file in store.folder(run).iterdir()) == ["metrics.jsonl", "run.json"]


def test_weights_are_trained_again_and_the_record_stays(results, tmp_path, monkeypatch):
    run, work, trained = main_run("g"), tmp_path / "work", []
    for lr in plan.LEARNING_RATES:
        finish(plan.sweep_run(run.arm, lr), 2.0 if lr == 1e-3 else 3.0)
    finish(run, 4.0)

    def train(words):
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "loss": 3.0, "accuracy": 0.5}))
        (out / "model.safetensors").touch()
        trained.append(out)
        return 0

    monkeypatch.setattr(queue, "train", train)
    for flags, expected in (([], []), (["--weights"], [work / run.name]), (["--weights"], [work / run.name])):
        monkeypatch.setattr(sys, "argv", ["bench.pretraining", "run", "--only", run.name, "--work", str(work), *flags])
        assert queue.main() == 0 and trained == expected
    assert store.last_evaluation(store.folder(run))["loss"] == 4.0


# Tells the one who waits for it, as a terminal does, and takes a while to end.
SLOW_END = """
import os, pathlib, signal, sys, time

def end(number, frame):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(130)

signal.signal(signal.SIGINT, end)
os.kill(os.getppid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupted_run_ends_by_itself(tmp_path):
    assert queue.train([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    with pytest.raises(KeyboardInterrupt):
        queue.train([sys.executable, "-c", SLOW_END, str(tmp_path / "checkpoint")])
    assert (tmp_path / "checkpoint").exists()


def test_paired_differences(results):
    losses = {"b": (10.0, 5.0, 4.0), "g": (4.0, 2.5, 2.0), "i": (5.0,)}
    runs = [run for run in plan.runs() if run.name.startswith("main-") and run.seed < len(losses.get(run.arm.name, ()))]
    for run in runs:
        finish(run, losses[run.arm.name][run.seed])
    rows = {line.split("|")[1].strip(): line for line in tables.paired(runs).splitlines()[2:]}
    # .25 - .1, .4 - .2 and .5 - .25: mean .2, standard deviation .05; Student's t of two degrees of freedom is 4.303.
    assert rows["g - b"].split("|")[2:-1] == [" 3 ", " +0.2000 ", " 0.0289 ", " [+0.0758, +0.3242] ", " 2.09 "]
    assert rows["g - i"].split("|")[2:-1] == [" 1 ", " +0.0500 ", " - ", " - ", " 1.25 "]
    apart = [run for run in runs if (run.arm.name, run.seed) in (("b", 1), ("b", 2), ("i", 0))]
    assert len(apart) == 3 and len(tables.paired(apart).splitlines()) == 2


def test_readmes_table_shows_the_first_seed(results):
    for run, loss in ((main_run("a"), 8.0), (main_run("c"), 4.0), (main_run("g"), 2.0), (main_run("j"), 2.5)):
        finish(run, loss)
    finish(next(run for run in plan.runs() if run.name == "main-c-2"), 1.0)
    rows = {
        line.split(" | ")[0]: line.split(" | ")[1:]
        for line in tables.brief(report.finished(), SAME_INPUT).splitlines()[2:]
    }
    assert rows["| HBERT-v1, the paper's"] == ["0.250", "**0.500** |"]
    assert rows["| additive layers only"] == ["", "0.400 |"]
    assert rows["| BERT as transformers ships it, compiled"] == ["0.125", " |"]
    assert rows["| no context: repeat the input, at [MASK] the commonest token"] == ["0.130", " |"]
    assert len(rows) == 1 + len(plan.IN_BRIEF)


def test_recipe_and_engineering_have_a_row_of_their_own():
    rows = [line.split("|")[1:3] for line in report.blocks()["pretraining-paired"].splitlines()]
    assert [" b - a ", " 2 "] in rows


def test_the_best_run_comes_first(results):
    for name, loss in {"b": 4.0, "g": 2.0, "normal": 3.0}.items():
        finish(main_run(name), loss)
    assert [run.arm.name for run in report.finished()] == ["g", "normal", "b"]


def test_the_tables_of_the_page(results):
    runs = [main_run("g"), main_run("normal")]
    for run, loss in zip(runs, (4.0, 2.0), strict=True):
        finish(run, loss)
    blank = dict.fromkeys(("arch", "size", "seed", "budget_seconds", "tokens_per_second", "escape_tokens"))
    rows = [
        Row(run=run.name, parameters=1, max_steps=9, finished=True, tokens=9, loss=loss, bits=0.0, accuracy=1 / loss,
            step=1769, clock_seconds=1200.0, escape_step=step, escape_seconds=step and 240.0, **blank)
        for run, loss, step in zip(runs, (4.0, 2.0), (356, None), strict=True)
    ]  # fmt: skip
    escape = Evaluation(step=900, train_seconds=600.0, tokens=9, loss=4.0, accuracy=0.2, num_masked=9, per_source={})
    second, first = [line.split(" | ") for line in tables.outcomes(runs, rows, [escape, None]).splitlines()[2:]]
    assert first[0] == "| normal: from N(0, .02)" and first[1:] == [
        "0",
        "0.001",
        "1,769",
        "20.0 min",
        "0.5000",
        "2.000",
        "-",
        "- |",
    ]
    assert second[2:] == ["0.0003", "1,769", "20.0 min", "0.2500", "4.000", "step 356, 4.0 min", "step 900, 10.0 min |"]
    for lr, loss in {5e-4: 3.0, 1e-3: 2.0}.items():
        finish(plan.sweep_run(plan.ARMS["g"], lr), loss)
    assert "| g | 3.000 / 0.3333 | **2.000 / 0.5000** |" in tables.sweeps()
    assert tables.step_times("arms").splitlines()[2 + 6] == "| g: HBERT-v1c | 500 |  |"


def test_every_run_of_the_plan_is_in_a_chapter():
    for run in plan.runs():
        assert any(belongs(run) for belongs in report.CHAPTERS.values()), run.name


@pytest.fixture
def kept_run(results):
    """The record of a run as `hbert pretrain` left it, with the marks of its text, which no command counts here."""
    run = main_run("g")
    shutil.copytree(KEPT / run.name, store.folder(run))
    info = read_info(store.folder(run))
    write_json(results / FILE_NAME, {content_key(info.corpus, info.tokenizer): asdict(MARKS)})
    how = {"rate": 0.15, "blocks": 256, "length": 512}
    write_json(results / report.SAME_INPUT, {content_key(info.corpus, info.tokenizer, how): asdict(SAME_INPUT)})
    return run


def test_the_clock_of_a_curve_is_that_of_the_calibration(kept_run):
    found = report.calibrated(kept_run)
    steps = [entry["step"] for entry in evaluations(kept_run)]
    # Half a second a step; the run itself took another time.
    assert [entry.train_seconds for entry in found.evaluations] == [0.5 * step for step in steps]
    (line,) = charts([found], {found.text_key: MARKS}, ("clock",))["accuracy-clock"].lines
    assert list(line.x) == pytest.approx([0.5 * step / 60 for step in steps])


def evaluations(run: plan.Run) -> list[dict]:
    lines = map(json.loads, (store.folder(run) / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if entry["kind"] == "eval"]


def test_the_report_fills_the_page_and_draws_its_figure(kept_run, tmp_path, monkeypatch):
    page, readme, figure, other = (tmp_path / name for name in ("page.md", "README.md", "arms.png", "hour.png"))
    readme.write_text("<!-- table: pretraining-brief -->\n<!-- end -->\n")
    names = ["sweeps", "arms", "paired", "sources", "marks", "same-input", "steps-arms", "steps-start"]
    page.write_text("".join(f"<!-- table: pretraining-{name} -->\n<!-- end -->\n" for name in names))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "FIGURES", {"arms": figure, "hour": other})
    report.report(Console(quiet=True))
    assert figure.read_bytes() == (store.RESULTS / "report" / "arms" / "accuracy-clock.png").read_bytes()
    assert not other.exists()
    last = evaluations(kept_run)[-1]
    assert f"**{last['accuracy']:.3f}**" in readme.read_text()
    imdb = last["per_source"]["imdb"]
    passed = [
        next(entry["step"] for entry in evaluations(kept_run) if entry["accuracy"] > mark)
        for mark in (MARKS.left_bigram, SAME_INPUT.left_bigram)
    ]
    steps = [f"step {step}, {0.5 * step / 60:.1f} min" for step in passed]
    for line in (
        f"{last['accuracy']:.4f} | {last['loss']:.3f} | {steps[0]} | {steps[1]} |",
        "| arms | 512 | 0.1300 | 6.320 | 0.2100 | 0.3100 | 0.0420 | 19,482 |",
        "| source | g | predictions |",
        f"| imdb | {imdb['accuracy']:.4f} | {imdb['num_masked']:,} |",
        "| group | unigram | left bigram | trigram | predictions |",
        "| arms | 0.0500 | 0.1500 | 0.3000 | 1,234 |",
    ):
        assert line in page.read_text()


def test_without_the_marks_of_a_text_no_table_says_that_no_run_passed_one(kept_run, monkeypatch):
    monkeypatch.setattr(report, "marks_of", lambda runs, folder: {runs[0].text_key: HbertError("the text is gone")})
    with pytest.raises(HbertError, match="the text is gone"):
        report.blocks()
