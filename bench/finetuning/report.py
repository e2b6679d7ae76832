"""The results so far as Markdown: scores over the seeds, the floor, and what the differences are worth."""

from __future__ import annotations

from statistics import mean, stdev

from bench.finetuning import plan, store
from hbert.evaluate.summary import markdown
from hbert.finetune.significance import compare

_METRICS = ("accuracy", "macro_f1", "mcc")


def report() -> str:
    """Returns the tables of all tasks that have results."""
    return "\n".join(filter(None, map(_task, plan.TASKS)))


def _task(task: str) -> str:
    finished = {model: runs for model in plan.MODELS if (runs := store.chosen(task, model))}
    if not finished:
        return ""
    parts = [f"### {task}\n", markdown(["model", "seeds", "lr", *_METRICS, "test, ms a text"], _scores(finished))]
    if plan.MODELS[0] in finished and len(finished) > 1:
        columns = ["against " + plan.MODELS[0], "difference of accuracy", "95% interval", "McNemar p by seed"]
        parts.append(markdown(columns, _differences(finished)))
    return "\n".join(parts)


def _scores(finished: dict[str, list[plan.Run]]) -> list[list[str]]:
    rows = []
    for model, runs in finished.items():
        records = [store.record(run) for run in runs]
        scores = [_spread([entry["test"][name]["mean"] for entry in records]) for name in _METRICS]
        speeds = [1e3 * run["seconds"] / run["texts"] for entry in records for run in entry["inference"]]
        rows.append([model, str(len(runs)), f"{runs[0].lr:g}", *scores, f"{mean(speeds):.2f}"])
    floor = store.record(next(iter(finished.values()))[0])["floor"]["test"]
    return [*rows, ["naive Bayes", "", "", *(f"{floor[name]:.4f}" for name in _METRICS), ""]]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _differences(finished: dict[str, list[plan.Run]]) -> list[list[str]]:
    (_, first), *others = finished.items()
    rows = []
    for model, runs in others:
        found = compare([store.predictions(run) for run in first], [store.predictions(run) for run in runs])
        interval = f"[{found.interval.low:+.4f}, {found.interval.high:+.4f}]"
        chances = ", ".join(f"{p:.2g}" for p in found.mcnemar_p)
        rows.append([model, f"{found.interval.difference:+.4f}", interval, chances])
    return rows
