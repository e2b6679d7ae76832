"""The results so far: scores over the seeds, the floor, what the differences are worth, and accuracy against time."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.documents import DOCS
from bench.finetuning import plan, store
from hbert.data.storage import replacing
from hbert.evaluate.summary import markdown
from hbert.finetune.significance import compare
from hbert.reporting import page
from hbert.reporting.lines import Line, LineChart
from hbert.reporting.style import Series, save_chart

PAGE = DOCS / "results-finetuning.md"
_METRICS = ("accuracy", "macro_f1", "mcc")
_CAPTION = (
    "Up and to the left is better. A point is the mean over the seeds at the learning rate that the validation split "
    "chose, its whiskers reach one standard deviation over them on either side. The time is that of predicting the "
    "test split, taken once a seed beside whatever else ran on the machine; for latencies use bench/run.py."
)
_Finished = dict[str, list[plan.Run]]
_Table = tuple[list[str], list[list[str]]]


def report() -> str:
    """Returns the tables of all tasks that have results, as Markdown."""
    finished, parts = _finished(), []
    for task in plan.TASKS:
        tables = [*_tables(finished.get(task, {})), *_sweeps(task)]
        parts += ["\n".join([f"### {task}\n", *(markdown(*table) for table in tables)])] if tables else []
    return "\n".join(parts)


def write_page(out: Path) -> Path:
    """Writes OUT/index.html, the tables and for each task accuracy against time, and returns its path.

    Raises:
        HbertError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    parts = []
    for task, runs in _finished().items():
        chart, title = accuracy_chart(runs), f"{task}: test accuracy against the time of a text"
        parts += [page.heading(task), page.figure(save_chart(chart, out, f"{task}-accuracy-time"), title, _CAPTION)]
        parts += [page.table(*table) for table in (*_tables(runs), *_sweeps(task))]
    path = out / "index.html"
    with replacing(path) as temporary:
        temporary.write_text(page.page("Fine-tuning", parts), encoding="utf-8")
    return path


def _finished() -> dict[str, _Finished]:
    """The runs of each model of each task, where there are any."""
    tasks = {task: {model: store.chosen(task, model) for model in plan.MODELS} for task in plan.TASKS}
    done = {task: {model: runs for model, runs in models.items() if runs} for task, models in tasks.items()}
    return {task: models for task, models in done.items() if models}


def _sweeps(task: str) -> list[_Table]:
    """The validation accuracy of the first seed at every rate that was tried, that of the chosen one bold."""
    tried = {model: [run for run in store.sweep(task, model) if store.is_done(run)] for model in plan.MODELS}
    rates = sorted({run.lr for runs in tried.values() for run in runs if run.lr is not None})
    lines = []
    for model, runs in tried.items():
        chosen = store.learning_rate(task, model)
        shown = {run.lr: f"{store.validation_accuracy(run):.4f}" for run in runs}
        cells = [f"**{shown[lr]}**" if lr == chosen else shown.get(lr, "") for lr in rates]
        lines += [[model, *cells]] if runs else []
    return [(["validation accuracy at", *(f"{rate:g}" for rate in rates)], lines)] if lines else []


def _tables(finished: _Finished) -> list[_Table]:
    if not finished:
        return []
    tables = [(["model", "seeds", "lr", *_METRICS, "test, ms a text"], _scores(finished))]
    if plan.MODELS[0] in finished and len(finished) > 1:
        columns = ["against " + plan.MODELS[0], "difference of accuracy", "95% interval", "McNemar p by seed"]
        tables.append((columns, _differences(finished)))
    return tables


def accuracy_chart(finished: _Finished) -> LineChart:
    """A point for each model: mean test accuracy over the seeds and one standard deviation, against time; the floor."""
    lines = []
    for colour, (model, runs) in enumerate(finished.items()):
        records = [store.record(run) for run in runs]
        found = [entry["test"]["accuracy"]["mean"] for entry in records]
        spread = stdev(found) if len(found) > 1 else 0.0
        centre = mean(found)
        lines.append(Line(Series(model, colour), [_text_time(records)], [centre], [centre - spread], [centre + spread]))
    floor = _floor(finished)["accuracy"]
    return LineChart("test split, ms a text", "test accuracy", lines, {f"naive Bayes {floor:.3f}": floor})


def _text_time(records: list[dict[str, Any]]) -> float:
    """Milliseconds."""
    return mean(1e3 * run["seconds"] / run["texts"] for entry in records for run in entry["inference"])


def _floor(finished: _Finished) -> dict[str, float]:
    return store.record(next(iter(finished.values()))[0])["floor"]["test"]


def _scores(finished: _Finished) -> list[list[str]]:
    rows = []
    for model, runs in finished.items():
        records = [store.record(run) for run in runs]
        scores = [_spread([entry["test"][name]["mean"] for entry in records]) for name in _METRICS]
        rows.append([model, str(len(runs)), f"{runs[0].lr:g}", *scores, f"{_text_time(records):.2f}"])
    floor = _floor(finished)
    return [*rows, ["naive Bayes", "", "", *(f"{floor[name]:.4f}" for name in _METRICS), ""]]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _differences(finished: _Finished) -> list[list[str]]:
    (_, first), *others = finished.items()
    rows = []
    for model, runs in others:
        found = compare([store.predictions(run) for run in first], [store.predictions(run) for run in runs])
        interval = f"[{found.interval.low:+.4f}, {found.interval.high:+.4f}]"
        chances = ", ".join(f"{p:.2g}" for p in found.mcnemar_p)
        rows.append([model, f"{found.interval.difference:+.4f}", interval, chances])
    return rows
