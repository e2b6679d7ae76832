"""How long a text of a task takes: the classifiers of all models by turns, in one process."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

import hbert_kernels
from bench import machine
from bench.finetuning import plan, store
from bench.harness import order_of
from hbert.errors import HbertError
from hbert.finetune.encoding import EncodedTexts, encode_texts
from hbert.finetune.inference import Runner, class_probabilities
from hbert.finetune.models import load_text_tokenizer, text_length
from hbert.finetune.stream import TextStream
from hbert.pretrain.machine import software

# Nine values: the interval of their median is that of the second and the eighth.
ROUNDS = 9


def measure(task: str, tasks: Path, models: Path, console: Console) -> dict[str, Any]:
    """Returns milliseconds a text of each model with a finished run, in every round, and where they were taken.

    The weights are random ones of the recorded configuration; the test split goes through in batches as in `hbert
    predict --dtype fp32`, freed memory kept by the process as there, tokenizing not counted. Threads are torch's own.

    Raises:
        HbertError: no model of the plan lies in `models`, whose tokenizer all of them share, or a file is missing.
    """
    heap_kept = hbert_kernels.keep_heap()
    classifiers = {model: _classifier(runs[0]) for model in plan.models(task) if (runs := store.chosen(task, model))}
    encoded, tokenizer = _test_texts(task, tasks, models, next(iter(classifiers.values())))
    readout = class_probabilities(multi=False)
    milliseconds: dict[str, list[float]] = {model: [] for model in classifiers}
    for turn in range(-1, ROUNDS):
        for model in order_of(list(classifiers), turn + 1):
            runner = Runner(classifiers[model], tokenizer, readout)
            runner.run(encoded)
            # The first round warms up.
            milliseconds[model] += [1e3 * runner.seconds / runner.texts] if turn >= 0 else []
        console.print(f"{task}: round {turn + 1} of {ROUNDS}")
    return {
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "heap_kept": heap_kept,
        "cpu_capability": hbert_kernels.cpu_capability(),
        "software": software(),
        "date": date.today().isoformat(),
        "texts": len(encoded),
        "tokens": int(encoded.lengths.sum()),
        "milliseconds": milliseconds,
    }


def _classifier(run: plan.Run) -> PreTrainedModel:
    record = store.record(run)
    about = dict(record["model"]["config"])
    config = AutoConfig.for_model(about.pop("model_type"), **about, num_labels=len(record["labels"]))
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def _test_texts(task: str, tasks: Path, models: Path, model: PreTrainedModel) -> tuple[EncodedTexts, Any]:
    names = [plan.pretrained(name) for name in plan.models(task)]
    there = [models / name for name in names if (models / name / "tokenizer.json").is_file()]
    if not there:
        raise HbertError(f"none of {', '.join(names)} is in {models}: their tokenizer is needed")
    tokenizer = load_text_tokenizer(str(there[0]), model)
    stream = TextStream.open(str(tasks / task / "test.tsv"), "text", None, ("label", "text"))
    texts = [text for piece, _ in stream.pieces() for text in piece]
    return encode_texts(tokenizer, texts, None, text_length(model, tokenizer, None, False)), tokenizer
