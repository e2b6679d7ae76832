"""``hbert finetune``: trains a text classifier from a pretrained checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from hbert.data.terminal import output_console, print_table
from hbert.pretrain.settings import DTYPES

from .experiment import finetune
from .metrics import MULTI, SINGLE
from .options import add_text_arguments, prepare_process
from .progress import Display
from .settings import SPLITS, Settings


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("finetune", help=summary, description=summary)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="checkpoint folder or hub name, with its tokenizer"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is an earlier result")
    _add_data_arguments(parser.add_argument_group("data"))
    _add_training_arguments(parser.add_argument_group("training"))


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    for name, split in SPLITS.items():
        group.add_argument(
            f"--{name}", metavar="F", help=f".csv, .tsv or .jsonl; with --dataset a split (default {split})"
        )
    group.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a data set of the Hugging Face hub, or a folder")
    add_text_arguments(group)
    group.add_argument("--label-column", default="label", metavar="C", help="default: label")
    group.add_argument("--multi-label", action="store_true", help="any number of labels a text")
    group.add_argument(
        "--label-separator", default=",", metavar="S", help="between labels of a CSV or TSV cell (default: a comma)"
    )


def _add_training_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, metavar="N", help="at most (default 10)")
    group.add_argument(
        "--lr", type=float, nargs="+", help="one, or several to choose from on validation (default 5e-5)"
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="texts (default 64)")
    group.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one run each (default 0)")
    group.add_argument("--warmup", type=float, metavar="P", help="share of the steps (default 0.1)")
    group.add_argument("--weight-decay", type=float, metavar="W", help="default 0.01")
    group.add_argument("--patience", type=int, metavar="N", help="end after N epochs that are not the best")
    group.add_argument(
        "--metric",
        choices=list(dict.fromkeys(SINGLE + MULTI)),
        help="chooses epoch, rate and seed (default: accuracy or micro_f1)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="auto (default): bf16 where the device computes it")
    group.add_argument(
        "--set", dest="fields", nargs="+", action="extend", metavar="FIELD=VALUE", help="fields of the configuration"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    prepare_process()
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    tuples = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    settings = Settings(**{name: value for name, value in (given | tuples).items() if value is not None})
    _report(settings.out, finetune(settings, Display()))


def _report(out: Path, record: dict[str, Any]) -> None:
    test, seeds = record["test"], record["settings"]["seeds"]
    rows = [
        [f"seed {seed}", *(f"{summary['values'][i]:.4f}" for summary in test.values())] for i, seed in enumerate(seeds)
    ]
    if len(seeds) > 1:
        rows.append(["mean", *(f"{summary['mean']:.4f}" for summary in test.values())])
        rows.append(["standard deviation", *(f"{summary['std']:.4f}" for summary in test.values())])
    if (floor := record["floor"]) is not None:
        rows.append(["naive Bayes", *(f"{value:.4f}" for value in floor["test"].values())])
    print_table(["test", *test], rows)
    for line in _conclusion(out, record):
        output_console().print(line, markup=False, soft_wrap=True)


def _conclusion(out: Path, record: dict[str, Any]) -> list[str]:
    speeds = record["inference"]
    pace = 1e3 * sum(s["seconds"] for s in speeds) / sum(s["texts"] for s in speeds)
    last = f"lr {record['lr']:g}, {pace:.3g} ms a text on the test split; seed {record['best_seed']} in {out}"
    return [last] if record["failure"] is None else [record["failure"], last]
