"""The model card: everything that defines a run, as the README.md of its model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .settings import PATHS


def model_card(record: Mapping[str, Any]) -> str:
    """Returns the card of a finished run in Markdown, from its run.json alone."""
    settings, result = record["settings"], record["result"]
    title = f"{settings['arch']}, {settings['size']}, seed {settings['seed']}"
    parts = [
        _front_matter(),
        f"# Masked language model: {title}\n",
        _summary(record, result),
        "## Use\n\n```python\nimport hbert  # registers the model with transformers\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n\n"
        'model = AutoModelForMaskedLM.from_pretrained("path/of/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```\n',
        "## Held-out text\n",
        _sources(record, result),
        "## Training\n",
        _table({**_settings(record), **_first_weights(record)}),
        "## Model\n",
        _table({"parameters": f"{record['parameters']['total']:,}", **record["model"]}),
        "## Made with\n",
        _table({**record["machine"], "processes": record["processes"], **record["software"], **_seconds(record)}),
        "The licences of the text apply: `hbert corpus --list` names those of its sources.\n",
    ]
    return "\n".join(parts)


def _front_matter() -> str:
    return "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- hbert\n---\n"


def _summary(record: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    budget = record["settings"]["budget"]
    bought = "" if budget is None else f" (a budget of {budget:g} s at {record['step_seconds']:.4g} s a step)"
    early = "" if record["status"] == "finished" else f", stopped by the deadline after {record['step']:,}"
    tokens = record["corpus"]["tokens"]["train"]
    return (
        f"Trained by `hbert pretrain` for {record['max_steps']:,} steps{bought}{early}, {result['tokens']:,} tokens "
        f"from a corpus of {tokens:,}. Top-1 accuracy on masked held-out tokens: **{result['accuracy']:.4f}** at a "
        f"loss of {result['loss']:.3f} nats. Accuracies hold for this tokenizer and this text only.\n"
    )


def _sources(record: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    rows = ["| source | training tokens | loss | accuracy | masked tokens |", "|---|---|---|---|---|"]
    for name, source in record["corpus"]["sources"].items():
        measured = result["per_source"].get(name)
        numbers = (
            "| | 0"
            if measured is None
            else f"{measured['loss']:.3f} | {measured['accuracy']:.4f} | {measured['num_masked']:,}"
        )
        rows.append(f"| {name} | {source['train']:,} | {numbers} |")
    rate, blocks, length = (record["eval"][name] for name in ("rate", "blocks", "length"))
    note = f"Corpus `{record['corpus']['fingerprint']}`, tokenizer `{record['tokenizer']['sha256'][:16]}`; "
    return "\n".join([*rows, "", f"{note}{rate:.0%} masked, at most {blocks:,} blocks of {length} tokens.\n"])


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the run was asked for, but for the model, which has a table of its own, with what was decided later."""
    # Where files lay is nobody's business; what stood in them is told by names and digests.
    asked = {
        name: value for name, value in record["settings"].items() if name not in PATHS and not name.startswith("model.")
    }
    return {name: record["plan"].get(name, value) for name, value in asked.items()}


def _first_weights(record: Mapping[str, Any]) -> dict[str, str]:
    taken = record["init"]
    if taken is None:
        return {}
    files = ", ".join(f"{name} {digest[:16]}" for name, digest in taken["sha256"].items())
    what = f"{taken['parts']} ({taken['parameters']:,} parameters) of {Path(taken['from']).name}"
    return {"first weights": f"{what}, {files}"}


def _seconds(record: Mapping[str, Any]) -> dict[str, str]:
    return {f"time: {name}": f"{value:.1f} s" for name, value in record["times"].items()}


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows, ""])
