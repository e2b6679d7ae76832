"""The model card of a fine-tuned model: everything that defines it, as the README.md of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hbert.evaluate.summary import markdown

# Not what defines the model: where it was written.
_LEFT_OUT = ("out", "overwrite")


def model_card(record: Mapping[str, Any]) -> str:
    """Returns the card in Markdown, from results.json alone."""
    parts = [
        _front_matter(record),
        f"# {record['model']['class']} fine-tuned\n",
        _summary(record),
        _use(record),
        "## Test split\n",
        _scores(record),
        "## Runs\n",
        _runs(record),
        "## Data\n",
        _data(record),
        "## Training\n",
        _table({name: value for name, value in record["settings"].items() if name not in _LEFT_OUT}),
        "## Model\n",
        _table({"parameters": f"{record['model']['parameters']:,}", **record["model"]["config"]}),
        "## Made with\n",
        _table({**record["machine"], **record["software"], "dtype": record["dtype"]}),
        "The licences of the data and of the checkpoint that it began with apply.\n",
    ]
    return "\n".join(parts)


def _front_matter(record: Mapping[str, Any]) -> str:
    tag = "\ntags:\n- hbert" if record["model"]["config"]["model_type"] == "hbert" else ""
    return f"---\nlibrary_name: transformers\npipeline_tag: text-classification{tag}\n---\n"


def _summary(record: Mapping[str, Any]) -> str:
    settings, labels = record["settings"], record["labels"]
    metric, seeds = settings["metric"], len(settings["seeds"])
    score = record["test"][metric]
    spread = "" if score["std"] is None else f" ± {score['std']:.4f} (mean and standard deviation of {seeds} seeds)"
    failure = "" if record["failure"] is None else f"\n**{record['failure']}.**\n"
    kind = "labels, any number of them a text" if settings["multi_label"] else "labels, one a text"
    return (
        f"Made by `hbert finetune` from `{settings['model']}`: {len(labels)} {kind}. Test {metric}: "
        f"**{score['mean']:.4f}**{spread}. Epoch, learning rate and seed were chosen by {metric} on "
        "the validation split; each seed's best epoch was tested once. The weights are those of seed "
        f"{record['best_seed']}.\n{failure}"
    )


def _use(record: Mapping[str, Any]) -> str:
    first = "import hbert  # registers the model with transformers\n"
    lines = first if record["model"]["config"]["model_type"] == "hbert" else ""
    return (
        f"## Use\n\n```python\nfrom transformers import pipeline\n{lines}\n"
        'classify = pipeline("text-classification", "path/of/this/folder")\n```\n'
    )


def _scores(record: Mapping[str, Any]) -> str:
    columns = ["", *record["test"]]
    values = [summary["values"] for summary in record["test"].values()]
    rows = [
        [f"seed {seed}", *(f"{value[i]:.4f}" for value in values)] for i, seed in enumerate(record["settings"]["seeds"])
    ]
    rows.append(["mean", *(f"{summary['mean']:.4f}" for summary in record["test"].values())])
    if (floor := record["floor"]) is not None:
        rows.append(["naive Bayes", *(f"{value:.4f}" for value in floor["test"].values())])
    labels = [
        [name, *("-" if entry[column] is None else f"{entry[column]:.4f}" for column in ("precision", "recall", "f1"))]
        + [str(entry["texts"])]
        for name, entry in record["best_seed_test"]["per_label"].items()
    ]
    picture = "" if record["settings"]["multi_label"] else "\n![confusion matrix](confusion.png)\n"
    of_labels = markdown([f"label (seed {record['best_seed']})", "precision", "recall", "F1", "texts"], labels)
    return f"{markdown(columns, rows)}\n{of_labels}{picture}"


def _runs(record: Mapping[str, Any]) -> str:
    metric = record["settings"]["metric"]
    rows = [
        [f"{run['lr']:g}", str(run["seed"]), str(run["best_epoch"]), str(len(run["epochs"]))]
        + [f"{run['validation'][metric]:.4f}", f"{run['seconds']:.1f}"]
        for run in record["runs"]
    ]
    return markdown(["lr", "seed", "best epoch", "epochs", f"validation {metric}", "seconds"], rows)


def _data(record: Mapping[str, Any]) -> str:
    rows = [
        [name, f"`{split['source']}`", f"{split['texts']:,}", f"{split['tokens']:,}", f"{split['truncated']:,}"]
        + [split.get("sha256", "")[:16]]
        for name, split in record["data"].items()
    ]
    table = markdown(["split", "source", "texts", "tokens", "truncated", "sha256"], rows)
    dataset = record["settings"]["dataset"]
    origin = "" if dataset is None else f"Splits of the data set `{dataset}`.\n\n"
    return f"{origin}{table}\nAt most {record['max_length']} tokens of a text are read.\n"


def _table(values: Mapping[str, Any]) -> str:
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in values.items()]
    return markdown(["", ""], rows)
