"""Measures HBERT against its peers: `python bench/run.py [--quick]`; docs/benchmarking.md has the protocol."""

from __future__ import annotations

import argparse
import datetime
import functools
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # this folder's own place on the path goes; an installed hbert comes before the checkout
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from rich.console import Console

from bench import machine, session
from bench.harness import FEWEST, Effort
from bench.report import Report, check_writable, save, show
from bench.suites import DTYPES, SUITES, Shape

MAX_SEQ = 512
INTERRUPTED = 130


def _names(what: str, allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names out of `allowed`."""
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {what} {', '.join(unknown)!r}; allowed: {', '.join(allowed)}")
        return names
    return parse


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(dict.fromkeys(_shape(part) for part in text.split(",")))


def _shape(text: str) -> Shape:
    try:
        batch, seq = (int(number) for number in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write BATCHxTOKENS, e.g. 8x128") from None
    if batch < 1 or not 1 <= seq <= MAX_SEQ:
        raise argparse.ArgumentTypeError(f"{text!r}: the batch must be at least 1, the tokens from 1 to {MAX_SEQ}")
    return batch, seq


def _threads(text: str) -> int:
    most = len(machine.cores())
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 1 to {most}, one for each core this process may use")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    candidates = tuple(dict.fromkeys(name for suite in SUITES.values() for name in suite.candidates))
    baselines = tuple(dict.fromkeys(name for suite in SUITES.values() for name in suite.baselines))
    made = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    add = made.add_argument
    add("--suite", type=_names("suite", tuple(SUITES)), default=tuple(SUITES), metavar="NAMES",
        help=f"comma-separated, of: {', '.join(SUITES)} (default: all)")
    add("--models", type=_names("model", candidates), metavar="NAMES", help=f"of: {', '.join(candidates)}")
    add("--peers", type=_names("peer", baselines), metavar="NAMES", help=f"of: {', '.join(baselines)}")
    add("--dtype", type=_names("dtype", DTYPES), metavar="NAMES", help=f"of: {', '.join(DTYPES)}")
    add("--shapes", type=_shapes, metavar="BxN,...", help="batch x tokens, e.g. 1x128,8x128")
    add("--threads", type=_threads, default=len(machine.cores()), metavar="N",
        help="cores to use, one thread on each (default: all that this process may use)")
    add("--min-time", type=_seconds, metavar="S", help="seconds of calls for each model and case (default: 2)")
    add("--quick", action="store_true", help="fewer shapes and rounds: under 90 s, wider intervals")
    add("--out", type=Path, default=machine.ROOT / "bench" / "results", metavar="DIR",
        help="folder for the CSV and JSON files (default: bench/results)")
    return made


def plan(options: argparse.Namespace, size: str = "base") -> list[session.SuitePlan]:
    """What the command line asks for. `size` is for the tests of the benchmark itself."""
    plans = []
    for suite in (SUITES[name] for name in options.suite):
        shapes = options.shapes or (suite.quick_shapes if options.quick else suite.default_shapes)
        plans.append(session.SuitePlan(
            suite,
            candidates=options.models or suite.default_candidates,
            baselines=options.peers or suite.default_baselines,
            cases=tuple(suite.cases(shapes, options.dtype or suite.default_dtypes, size)),
        ))
    return plans


def effort(options: argparse.Namespace) -> Effort:
    """How long to measure: --min-time, else the default, or the short one of --quick."""
    base = Effort(min_time=0.5, min_rounds=FEWEST) if options.quick else Effort()
    return Effort(options.min_time or base.min_time, base.min_rounds)


def about(options: argparse.Namespace, cpus: list[int], argv: Sequence[str]) -> dict[str, object]:
    """The report's header, as far as it is known before the first worker has started."""
    now = datetime.datetime.now().astimezone()
    return {
        **machine.describe(),
        "threads": options.threads,
        "processors": ",".join(map(str, cpus)),
        "git": machine.git_revision(),
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/run.py", *argv]),
        "torch": "",
    }


def main(argv: Sequence[str], size: str = "base") -> int:
    """Runs the benchmark and returns the exit code: 0, 1 if anything failed, 2 for bad usage, 130 if interrupted."""
    made = parser()
    options = made.parse_args(argv)
    try:
        check_writable(options.out)
    except OSError as error:
        made.error(f"--out {options.out}: cannot write results there: {error.strerror}")
    cpus = machine.cores()[:options.threads]
    report = Report(about(options, cpus, argv))
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{machine.short_name()}"
    save_report = functools.partial(save, report, options.out, stem)
    interrupted = False
    try:
        session.run(plan(options, size), cpus, effort(options), report, save_report)
    except KeyboardInterrupt:
        interrupted = True
    paths = save_report()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    show(report, console)
    console.print("wrote " + " and ".join(map(str, paths)), highlight=False, soft_wrap=True)
    if interrupted:
        console.print("interrupted: the cases above are complete, the others were not measured")
        return INTERRUPTED
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
