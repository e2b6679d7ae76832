"""``hbert predict``: labels texts with a fine-tuned classifier."""

from __future__ import annotations

import argparse
from typing import Any

from hbert.data.terminal import output_console
from hbert.precision import device_of

from .inference import class_probabilities
from .models import label_names, load_classifier
from .options import prepare_process
from .predictions import SUFFIXES, writing_predictions
from .stream import add_stream_arguments, load_runner, open_stream, writing


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("predict", help=summary, description=summary)
    add_stream_arguments(parser, SUFFIXES)
    parser.add_argument(
        "--label-separator", default=",", metavar="S", help="between labels of a CSV or TSV cell (default: a comma)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    prepare_process()
    stream = open_stream(args, SUFFIXES)
    model = load_classifier(args.model, device_of(args))
    multi = model.config.problem_type == "multi_label_classification"
    runner, max_length = load_runner(args, model, class_probabilities(multi))
    names = label_names(model.config)
    with writing(args.out), writing_predictions(args.out, names, multi, args.label_separator) as writer:
        for probabilities in stream.results(runner, max_length, "predict"):
            writer.write(probabilities)
    for line in stream.summary(runner, max_length):
        output_console().print(line, markup=False, soft_wrap=True)
