"""Makes the HTML report of a run anew: `python -m bench.report RESULT.csv [--out DIR]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report.document import make_report
from hbert.data.errors import HbertError


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("csv", type=Path, metavar="RESULT.csv", help="a table of bench/run.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RESULT beside the CSV)")
    options = parser.parse_args(argv)
    try:
        print("\n".join(make_report(options.csv, options.out)))
    except HbertError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
