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
from bench.client import HEAP_ALL, HEAP_OURS, HEAPS, Setup
from bench.harness import Effort
from bench.ops import NAMES
from bench.report import Report, check_writable, save
from bench.report.document import make_report
from bench.suites import DEFAULT_SUITES, DEVICES, DTYPES, SIZES, SUITES
from bench.suites.suite import Shape, Suite, Wanted
from bench.tables import show
from hbert.data.errors import HbertError

INTERRUPTED = 130
WIDTH = 180  # of the table where the output is not a terminal


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
    if batch < 1 or seq < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: batch and tokens must be at least 1")
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
    add("--suite", type=_names("suite", tuple(SUITES)), default=DEFAULT_SUITES, metavar="NAMES",
        help=f"comma-separated, of: {', '.join(SUITES)} (default: {', '.join(DEFAULT_SUITES)})")
    add("--models", type=_names("model", candidates), metavar="NAMES", help=f"of: {', '.join(candidates)}")
    add("--peers", type=_names("peer", baselines), metavar="NAMES", help=f"of: {', '.join(baselines)}")
    add("--size", type=_names("size", SIZES), metavar="NAMES",
        help=f"of the models, of: {', '.join(SIZES)} (default: {SIZES[0]})")
    add("--ops", type=_names("op", NAMES), metavar="NAMES", help=f"for the suite kernels, of: {', '.join(NAMES)}")
    add("--dtype", type=_names("dtype", DTYPES), metavar="NAMES", help=f"of: {', '.join(DTYPES)}")
    add("--shapes", type=_shapes, metavar="BxN,...", help="batch x tokens, e.g. 1x128,8x128")
    add("--threads", type=_threads, default=len(machine.cores()), metavar="N",
        help="cores to use, one thread on each (default: all that this process may use)")
    add("--device", choices=DEVICES, default=DEVICES[0], help=f"where the tensors live (default: {DEVICES[0]})")
    add("--heap", choices=HEAPS, default=HEAP_ALL,
        help="whose workers keep freed memory (hbert_kernels.keep_heap): of all peers, of ours alone, as their users "
             f"have it, or none (default: {HEAP_ALL})")
    add("--min-time", type=_seconds, metavar="S",
        help="seconds of calls for each peer and case (default: 2, for kernels 0.1)")
    add("--quick", action="store_true", help="fewer shapes and rounds: under 90 s, wider intervals")
    add("--out", type=Path, default=machine.ROOT / "bench" / "results", metavar="DIR",
        help="folder for the CSV and JSON files (default: bench/results)")
    return made


def plan(options: argparse.Namespace) -> list[session.SuitePlan]:
    """What the command line asks for.

    Raises:
        ValueError: a flag does not fit a suite that was asked for.
    """
    slow = _lacks_bf16(options)
    dtypes = DTYPES[:1] if slow else options.dtype
    plans = []
    for suite in (SUITES[name] for name in options.suite):
        _check_fit(suite, options)
        quick = options.quick or (slow and not suite.has_ops)
        wanted = Wanted(options.shapes, dtypes, options.ops, quick, options.size or SIZES[:1])
        plans.append(session.SuitePlan(
            suite,
            candidates=options.models or suite.default_candidates,
            baselines=options.peers or suite.default_baselines,
            cases=tuple(suite.cases(wanted)),
            effort=effort(suite, options),
        ))
    return plans


def _lacks_bf16(options: argparse.Namespace) -> bool:
    """Whether fp32 takes the place of the defaults. Models of base size then take so long that they get few tokens."""
    return options.dtype is None and options.device == DEVICES[0] and not machine.multiplies_bf16()


def _check_fit(suite: Suite, options: argparse.Namespace) -> None:
    named = (("--models", options.models, suite.candidates), ("--peers", options.peers, suite.baselines))
    for flag, names, allowed in named:
        unknown = ", ".join(name for name in names or () if name not in allowed)
        if unknown:
            raise ValueError(f"{flag}: the suite {suite.name} has no {unknown}; allowed: {', '.join(allowed)}")
    if options.ops and not suite.has_ops:
        raise ValueError(f"--ops: the suite {suite.name} measures models")
    if options.size and suite.has_ops:
        raise ValueError(f"--size: the suite {suite.name} measures ops, of one width")
    if options.heap == HEAP_OURS and suite.one_process:
        raise ValueError(f"--heap {HEAP_OURS}: all peers of the suite {suite.name} share a process")
    too_long = [seq for _, seq in options.shapes or () if seq > suite.max_seq]
    if too_long:
        raise ValueError(f"--shapes: the suite {suite.name} takes at most {suite.max_seq} tokens, got {too_long[0]}")


def effort(suite: Suite, options: argparse.Namespace) -> Effort:
    """How long to measure: --min-time, else the suite's default, or its short one for --quick."""
    base = suite.quick_effort if options.quick else suite.effort
    return Effort(options.min_time or base.min_time, base.min_rounds)


def about(options: argparse.Namespace, cpus: list[int], argv: Sequence[str]) -> dict[str, object]:
    """The report's header, as far as it is known before the first worker has started."""
    now = datetime.datetime.now().astimezone()
    left_out = "no products of it here: fp32 instead, models at the shapes of --quick, unless --dtype says otherwise"
    return {
        **machine.describe(),
        "device": options.device,
        "threads": options.threads,
        "heap_kept": options.heap,
        **({"bf16": left_out} if _lacks_bf16(options) else {}),
        "processors": ",".join(map(str, cpus)),
        "git": machine.git_revision(),
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/run.py", *argv]),
        "torch": "",
    }


def _missing_device(name: str) -> str | None:
    """Why there is no such device. Only a GPU is looked for, by torch: the coordinator needs it for nothing else."""
    if name == DEVICES[0]:
        return None
    from bench.device import missing

    return missing(name)


def _html_report(table: Path) -> list[str]:
    """Wins and losses, and where the page is; what was measured is not lost if it cannot be made."""
    try:
        return make_report(table)
    except HbertError as error:
        return [f"no HTML report: {error}"]


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and returns the exit code: 0, 1 if anything failed, 2 for bad usage, 130 if interrupted."""
    made = parser()
    options = made.parse_args(argv)
    if reason := _missing_device(options.device):
        made.error(f"--device {options.device}: {reason}")
    try:
        check_writable(options.out)
    except OSError as error:
        made.error(f"--out {options.out}: cannot write results there: {error.strerror}")
    try:
        plans = plan(options)
    except ValueError as error:
        made.error(str(error))
    cpus = machine.cores()[:options.threads]
    report = Report(about(options, cpus, argv))
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{machine.short_name()}"
    save_report = functools.partial(save, report, options.out, stem)
    interrupted = False
    try:
        session.run(plans, Setup(cpus, options.device, options.heap), report, save_report)
    except KeyboardInterrupt:
        interrupted = True
    paths = save_report()
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    show(report, console)
    console.print("wrote " + " and ".join(map(str, paths)), highlight=False, soft_wrap=True)
    for line in _html_report(paths[0]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        console.print("interrupted: the cases above are complete, the others were not measured")
        return INTERRUPTED
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
