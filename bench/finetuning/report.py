"""The results so far: scores over the seeds, the floor, what the differences are worth, and accuracy against time."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median, stdev

from bench.documents import DOCS
from bench.finetuning import plan, store
from bench.stats import paired_ratio
from hbert.data.storage import replacing
from hbert.evaluate.summary import markdown
from hbert.finetune.significance import compare
from hbert.processor import label
from hbert.reporting import page
from hbert.reporting.lines import Line, LineChart
from hbert.reporting.style import Series, save_chart

PAGE = DOCS / "results-finetuning.md"
_METRICS = ("accuracy", "macro_f1", "mcc")
_DIFFERENCE = ("difference of accuracy", "95% interval")
_CAPTION = (
    "Up and to the left is better. A point is the mean over the seeds at the learning rate that the validation split "
    "chose, its whiskers reach one standard deviation over them on either side. The time is the median of the rounds "
    "of python -m bench.finetuning time: the test split, the models by turns on one machine."
)
_Finished = dict[str, list[plan.Run]]
_Table = tuple[list[str], list[list[str]]]


def report() -> str:
    """Returns the tables of all tasks that have results, as Markdown."""
    finished, parts = _finished(), []
    for task in plan.TASKS:
        runs = finished.get(task, {})
        tables = [*_tables(task, runs), *_sweeps(task)]
        notes = [f"{note}\n" for note in _notes(task, runs)]
        if runs and store.times(task):
            notes.append(f"![{_title(task)}](images/{figure(task).name})\n")
        parts += ["\n".join([f"### {task}\n", *(markdown(*table) for table in tables), *notes])] if tables else []
    return "\n".join(parts)


def write_page(out: Path) -> Path:
    """Writes OUT/index.html, the tables and for each task accuracy against time, and returns its path.

    Raises:
        HbertError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    parts = []
    for task, runs in _finished().items():
        parts.append(page.heading(task))
        if store.times(task):
            images = save_chart(accuracy_chart(task, runs), out, figure(task).stem)
            parts.append(page.figure(images, _title(task), _CAPTION))
        parts += [_html(table) for table in (*_tables(task, runs), *_sweeps(task))]
        parts += [page.paragraph(note.replace("`", "")) for note in _notes(task, runs)]
    path = out / "index.html"
    with replacing(path) as temporary:
        temporary.write_text(page.page("Fine-tuning", parts), encoding="utf-8")
    return path


def _html(table: _Table) -> str:
    columns, rows = table
    return page.table(
        columns, [[page.Cell(cell.strip("*"), "good") if "**" in cell else cell for cell in row] for row in rows]
    )


def figure(task: str) -> Path:
    """Where the page of the documentation has its figure of a task; that of `write_page` has the same name."""
    return DOCS / "images" / f"finetuning-{task}.png"


def _title(task: str) -> str:
    return f"{task}: test accuracy against the time of a text"


def _finished() -> dict[str, _Finished]:
    """The runs of each model of each task, where there are any."""
    tasks = {task: {model: store.chosen(task, model) for model in plan.models(task)} for task in plan.TASKS}
    done = {task: {model: runs for model, runs in models.items() if runs} for task, models in tasks.items()}
    return {task: models for task, models in done.items() if models}


def _sweeps(task: str) -> list[_Table]:
    """The validation accuracy of the first seed at every rate that was tried, that of the chosen one bold."""
    tried = {model: [run for run in store.sweep(task, model) if store.is_done(run)] for model in plan.models(task)}
    rates = sorted({run.lr for runs in tried.values() for run in runs if run.lr is not None})
    lines = []
    for model, runs in tried.items():
        chosen = store.learning_rate(task, model)
        shown = {run.lr: f"{store.validation_accuracy(run):.4f}" for run in runs}
        cells = [f"**{shown[lr]}**" if lr == chosen else shown.get(lr, "") for lr in rates]
        lines += [[model, *cells]] if runs else []
    return [(["validation accuracy at", *(f"{rate:g}" for rate in rates)], lines)] if lines else []


def _tables(task: str, finished: _Finished) -> list[_Table]:
    if not finished:
        return []
    tables = [(["model", "seeds", "lr", *_METRICS, "ms a text", "speed (BERT in the kit: 1)"], _scores(task, finished))]
    if differences := _differences(finished):
        tables.append((["models", *_DIFFERENCE, "McNemar p by seed"], differences))
    if at_papers_rate := _at_papers_rate(task):
        tables.append(([f"at the paper's {plan.PAPERS_RATE:g}", *_METRICS, *_DIFFERENCE, "McNemar p"], at_papers_rate))
    return tables


def _at_papers_rate(task: str) -> list[list[str]]:
    """Test scores of the first seed at the rate that the paper has for every model, and the difference to BERT."""
    runs = {model: [plan.sweep_run(task, model, plan.PAPERS_RATE)] for model in plan.models(task)}
    done = {model: found for model, found in runs.items() if store.is_done(*found)}
    differences = {row[0].partition(" - ")[0]: row[1:] for row in _differences(done)}
    return [
        [model, *(f"{_test_scores(found, name)[0]:.4f}" for name in _METRICS), *differences.get(model, ("", "", ""))]
        for model, found in done.items()
    ]


def _notes(task: str, finished: _Finished) -> list[str]:
    """What the tables do not say by themselves: the dtype, who is below the floor, and where the times are from."""
    if not finished:
        return []
    used = sorted({store.record(run)["dtype"] for runs in finished.values() for run in runs})
    notes, floor = [f"Trained and tested in {', '.join(used)}."], _floor(finished)["accuracy"]
    if below := [model for model, runs in finished.items() if mean(_test_scores(runs, "accuracy")) < floor]:
        notes.append(f"Below naive Bayes, so pretraining has failed for this task: {', '.join(below)}.")
    if times := store.times(task):
        rounds = len(next(iter(times["milliseconds"].values())))
        notes.append(
            "Times: `python -m bench.finetuning time`, random weights of these configurations, float32, "
            f"threads: {times['threads']}, {rounds} rounds by turns, {times['texts']:,} texts of "
            f"{times['tokens'] / times['texts']:.1f} tokens; {label(times['machine'])}, "
            f"{times['cpu_capability']}; commit {times['software']['revision']}; {times['date']}."
        )
    return notes


def accuracy_chart(task: str, finished: _Finished) -> LineChart:
    """A point for each model: mean test accuracy over the seeds and one standard deviation, against time; the floor."""
    lines = []
    for colour, (model, runs) in enumerate(finished.items()):
        if not (milliseconds := _milliseconds(task, model)):
            continue
        found = _test_scores(runs, "accuracy")
        spread = stdev(found) if len(found) > 1 else 0.0
        centre = mean(found)
        lines.append(
            Line(Series(model, colour), [median(milliseconds)], [centre], [centre - spread], [centre + spread])
        )
    floor = _floor(finished)["accuracy"]
    return LineChart("test split, ms a text", "test accuracy", lines, {f"naive Bayes {floor:.3f}": floor})


def _milliseconds(task: str, model: str) -> list[float]:
    """A text's, in each round; none where the model was not timed."""
    return (store.times(task) or {}).get("milliseconds", {}).get(model, [])


def _test_scores(runs: list[plan.Run], metric: str) -> list[float]:
    return [store.record(run)["test"][metric]["mean"] for run in runs]


def _floor(finished: _Finished) -> dict[str, float]:
    return store.record(next(iter(finished.values()))[0])["floor"]["test"]


def _scores(task: str, finished: _Finished) -> list[list[str]]:
    rows = []
    for model, runs in finished.items():
        scores = [_spread(_test_scores(runs, name)) for name in _METRICS]
        rows.append([model, str(len(runs)), f"{runs[0].lr:g}", *scores, *_speed(task, model)])
    floor = _floor(finished)
    return [*rows, ["naive Bayes", "", "", *(f"{floor[name]:.4f}" for name in _METRICS), "", ""]]


def _speed(task: str, model: str) -> tuple[str, str]:
    """Time of a text, and how many times as fast as its baseline."""
    own, other = _milliseconds(task, model), _milliseconds(task, plan.baseline(model))
    if not own:
        return "", ""
    if not other or model == plan.baseline(model):
        return f"{median(own):.3f}", ""
    ratio = paired_ratio(other, own)
    return f"{median(own):.3f}", f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _differences(finished: _Finished) -> list[list[str]]:
    rows = []
    for model in finished:
        baseline = plan.baseline(model)
        if model == baseline or baseline not in finished:
            continue
        first, second = ([store.predictions(run) for run in finished[name]] for name in (baseline, model))
        found = compare(first, second)
        interval = f"[{found.interval.low:+.4f}, {found.interval.high:+.4f}]"
        chances = ", ".join(f"{p:.2g}" for p in found.mcnemar_p)
        rows.append([f"{model} - {baseline}", f"{found.interval.difference:+.4f}", interval, chances])
    return rows
