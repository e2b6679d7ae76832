"""The results so far: a report for each set of runs that can be compared, and the tables and figures of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from rich.console import Console

from bench.documents import DOCS, README, keep_figure, rewrite
from bench.pretraining import plan, store, tables
from hbert.data.ngram import NgramMarks
from hbert.data.storage import content_key, read_json, write_json
from hbert.errors import HbertError
from hbert.evaluate.marks import marks_of, tokens_of
from hbert.evaluate.report_command import write_report
from hbert.evaluate.run_folder import Run, read_runs
from hbert.evaluate.same_input import SameInputMarks, same_input_marks
from hbert.evaluate.summary import summary_rows

# What is compared with each other -> the runs of the plan.
CHAPTERS: dict[str, Callable[[plan.Run], bool]] = {
    "arms": lambda run: run.arm.group == "arms" and run.name.startswith("main-") and run.seed == 0,
    "seeds": lambda run: run.name.startswith("main-") and run.seed > 0,
    "blocks-of-128": lambda run: run.blocks == "128",
    "hour": lambda run: run.seconds == plan.HOUR_SECONDS,
    "start": lambda run: run.arm.group == "start",
}
SAME_INPUT = "same-input-marks.json"
_AXES = ("clock", "steps")
PAGE = DOCS / "results-pretraining.md"
# Chapters whose accuracy against the clock the page shows.
FIGURES = {
    "arms": DOCS / "images" / "pretraining-accuracy.png",
    "hour": DOCS / "images" / "pretraining-hour.png",
    "start": DOCS / "images" / "pretraining-start.png",
}


def report(console: Console) -> None:
    """Writes the page's tables and figures, README's table, and docs/results/pretraining/report/CHAPTER.

    The clock is that of the calibration, not the time that a run took beside other load. A chapter without runs has no
    report.

    Raises:
        HbertError: the page has no place for a table; or the n-gram marks of a text are not kept, and it is not here.
    """
    made = blocks()
    rewrite(PAGE, made)
    rewrite(README, in_brief())
    for chapter, chosen in chapters().items():
        console.print(chapter, style="bold")
        out = store.RESULTS / "report" / chapter
        out.mkdir(parents=True, exist_ok=True)
        runs = [calibrated(run) for run in chosen]
        write_report(runs, _marks(runs), out, _AXES)
        if chapter in FIGURES:
            keep_figure(out / "accuracy-clock.png", FIGURES[chapter])
    console.print(made["pretraining-paired"], markup=False)


def blocks() -> dict[str, str]:
    """The tables of the page, by name. What has to be counted of a text for them is kept beside the records.

    Raises:
        HbertError: the n-gram marks of a text are not kept, and it is not here.
    """
    made = {"pretraining-sweeps": tables.sweeps()}
    marks: dict[str, NgramMarks] = {}
    strict: dict[tuple[str, str], SameInputMarks] = {}
    for chapter, chosen in chapters().items():
        runs = [calibrated(run) for run in chosen]
        found = _marks(runs)
        marks |= {run.arm.group: found[read.text_key] for run, read in zip(chosen, runs, strict=True)}
        inputs = [same_input(read) for read in runs]
        strict |= {(run.arm.group, run.blocks): one for run, one in zip(chosen, inputs, strict=True)}
        escapes = [read.escape(one.left_bigram) for read, one in zip(runs, inputs, strict=True)]
        made[f"pretraining-{chapter}"] = tables.outcomes(chosen, summary_rows(runs, found), escapes)
    done = finished()
    made["pretraining-paired"] = tables.paired(
        [run for run in done if run.name.startswith("main-") and run.arm.name in plan.COMPARED]
    )
    by_name = {run.name: run for run in done}
    shown = [by_name[f"main-{arm}-0"] for arm in plan.BY_SOURCE if f"main-{arm}-0" in by_name]
    made["pretraining-sources"] = tables.sources([replace(calibrated(run), label=run.arm.name) for run in shown])
    made["pretraining-marks"] = tables.marks(marks)
    made["pretraining-same-input"] = tables.same_input(strict)
    groups = {arm.group for arm in plan.ARMS.values() if store.calibration(arm.group).is_file()}
    return made | {f"pretraining-steps-{group}": tables.step_times(group) for group in groups}


def in_brief() -> dict[str, str]:
    """README's table, by its name."""
    done = finished()
    first = next(run for run in done if run.arm.group == "arms" and run.blocks == "512")
    return {"pretraining-brief": tables.brief(done, same_input(calibrated(first)))}


def chapters() -> dict[str, list[plan.Run]]:
    """The finished runs of each chapter that has some."""
    done = finished()
    found = {chapter: [run for run in done if belongs(run)] for chapter, belongs in CHAPTERS.items()}
    return {chapter: chosen for chapter, chosen in found.items() if chosen}


def finished() -> list[plan.Run]:
    """The runs that have a record, sweeps left out; the highest held-out accuracy first, in legends too."""
    accuracy = {run: store.last_evaluation(store.folder(run))["accuracy"] for run in plan.runs() if store.is_done(run)}
    return sorted(accuracy, key=lambda run: -accuracy[run])


def _marks(runs: Sequence[Run]) -> dict[tuple[str, str], NgramMarks]:
    """The marks of every text among the runs. Without them it would look as if no run had passed one."""
    found = {}
    for key, marks in marks_of(runs, store.RESULTS).items():
        if isinstance(marks, HbertError):
            raise marks
        found[key] = marks
    return found


def same_input(run: Run) -> SameInputMarks:
    """What counting models have right on the inputs that a run was evaluated on; kept beside the records.

    Raises:
        HbertError: they are not kept, and the text is not here.
    """
    file, how = store.RESULTS / SAME_INPUT, read_json(run.path / "run.json")["eval"]
    kept = read_json(file) if file.is_file() else {}
    name = content_key(*run.text_key, how)
    if name not in kept:
        found = same_input_marks(tokens_of(run), how["length"], rate=how["rate"], max_blocks=how["blocks"])
        kept[name] = asdict(found)
        write_json(file, kept)
    return SameInputMarks(**kept[name])


def calibrated(run: plan.Run) -> Run:
    """What a finished run left, on the clock of the calibration: step x calibrated seconds of a step."""
    (found,) = read_runs([store.folder(run)])
    seconds = store.step_seconds(run)
    assert seconds is not None
    clock = [replace(entry, train_seconds=entry.step * seconds) for entry in found.evaluations]
    label = f"{run.arm.name}: {run.arm.what}" if run.seed == 0 else f"{run.arm.name}, seed {run.seed}"
    return replace(found, label=label, evaluations=clock, info=replace(found.info, step_seconds=seconds))
