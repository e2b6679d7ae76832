"""Makes the HTML report of a run anew, or its tables for a document: `python -m bench.report RESULT.csv`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report.document import make_report
from bench.report.markdown import tables
from bench.report.results import read_results
from hbert.errors import HbertError


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("csv", type=Path, metavar="RESULT.csv", help="a table of bench/run.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RESULT beside the CSV)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown, write nothing")
    options = parser.parse_args(argv)
    try:
        if options.markdown:
            print(tables(read_results(options.csv)))
        else:
            print("\n".join(make_report(options.csv, options.out)))
    except HbertError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
