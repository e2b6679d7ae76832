"""Measures HBERT against its peers: `python bench/run.py [--quick]`; docs/benchmarking.md has the protocol."""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # this folder's own place on the path goes; an installed hbert comes before the checkout
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from rich.console import Console

from bench import checkpoint, compare, machine, session
from bench.client import HEAP_ALL, HEAPS, Setup
from bench.names import DTYPES
from bench.ops import NAMES
from bench.plan import installed, lacks_bf16, plan
from bench.report import Report, check_writable, save
from bench.report.document import make_report
from bench.session import SuitePlan
from bench.suites import DEFAULT_SUITES, DEVICES, SIZES, SUITES
from bench.suites.suite import Shape
from bench.tables import show, show_changes
from hbert.errors import HbertError
from hbert.revision import measured_revision

FAILED, SLOWER, BUSY, INTERRUPTED = 1, 3, 4, 130  # exit codes; argparse has 2
_INTERRUPTION = "interrupted"
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


def _percentage(text: str) -> float:
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not 0 < percent < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage above 0, such as 5%")
    return percent / 100


def parser() -> argparse.ArgumentParser:
    """The command line."""
    candidates = tuple(dict.fromkeys(name for suite in SUITES.values() for name in suite.candidates))
    baselines = tuple(dict.fromkeys(name for suite in SUITES.values() for name in suite.baselines))
    made = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    add = made.add_argument
    add(
        "--suite",
        type=_names("suite", tuple(SUITES)),
        metavar="NAMES",
        help=f"comma-separated, of: {', '.join(SUITES)} (default: {', '.join(DEFAULT_SUITES)})",
    )
    ops = SUITES["kernels"]
    for flag, what, names, of_ops in (
        ("--models", "model", candidates, ops.candidates),
        ("--peers", "peer", baselines, ops.baselines),
    ):
        of_models = ", ".join(name for name in names if name not in of_ops)
        told = f"of: {of_models}; for the suite {ops.name}: {', '.join(of_ops)}"
        add(flag, type=_names(what, names), metavar="NAMES", help=told)
    add(
        "--size",
        type=_names("size", SIZES),
        metavar="NAMES",
        help=f"of the models, of: {', '.join(SIZES)} (default: {SIZES[0]}; throughput: 4x256 and base)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a trained encoder, BERT-like or HBERT, for latency and varlen in place of the sizes",
    )
    add("--ops", type=_names("op", NAMES), metavar="NAMES", help=f"for the suite kernels, of: {', '.join(NAMES)}")
    add("--dtype", type=_names("dtype", DTYPES), metavar="NAMES", help=f"of: {', '.join(DTYPES)}")
    add("--shapes", type=_shapes, metavar="BxN,...", help="batch x tokens, e.g. 1x128,8x128")
    add(
        "--threads",
        type=_threads,
        default=len(machine.cores()),
        metavar="N",
        help="cores to use, one thread on each (default: all that this process may use)",
    )
    add("--device", choices=DEVICES, default=DEVICES[0], help=f"where the tensors live (default: {DEVICES[0]})")
    add(
        "--heap",
        choices=HEAPS,
        default=HEAP_ALL,
        help="whose workers keep freed memory (hbert_kernels.keep_heap): of all peers, of ours alone, as their users "
        f"have it, or none (default: {HEAP_ALL})",
    )
    add(
        "--min-time",
        type=_seconds,
        metavar="S",
        help="seconds of calls for each peer and case (default: 2, for kernels 0.1; with --quick 0.5 and 0.05)",
    )
    add("--quick", action="store_true", help="fewer shapes, less time for each")
    add("--strict", action="store_true", help=f"a run on a busy machine ends with exit code {BUSY}")
    add("--compare", type=Path, metavar="OLD.csv", help="tell what has changed since an earlier run")
    add(
        "--fail-if-slower",
        type=_percentage,
        metavar="P%",
        help="with --compare: a candidate whose call takes longer by more than P%%, and a time by 30 us, makes the "
        f"exit code {SLOWER}",
    )
    add(
        "--out",
        type=Path,
        default=machine.ROOT / "bench" / "results",
        metavar="DIR",
        help="folder for the CSV and JSON files (default: bench/results)",
    )
    return made


def about(options: argparse.Namespace, cpus: list[int], argv: Sequence[str]) -> dict[str, object]:
    """The report's header, as far as it is known before the first worker has started."""
    now = datetime.datetime.now().astimezone()
    left_out = "no products of it here: fp32 instead, models at the shapes of --quick, unless --dtype says otherwise"
    return {
        **machine.describe(),
        "device": options.device,
        "threads": options.threads,
        "heap_kept": options.heap,
        **({"bf16": left_out} if lacks_bf16(options) else {}),
        "processors": ",".join(map(str, cpus)),
        "git": measured_revision(_package(), machine.ROOT),
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/run.py", *argv]),
        "torch": "",
    }


def _package() -> Path:
    """Where the workers find hbert_kernels, which they import and this process does not."""
    spec = importlib.util.find_spec("hbert_kernels")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


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


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does: workers are ended, and what is complete is shown."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(plans: Sequence[SuitePlan], setup: Setup, report: Report, save_report: Callable[[], object]) -> str | None:
    """Measures into the report; what ended the run before its last case, such as a full disk."""
    try:
        with _terminated_like_interrupted():
            session.run(plans, setup, report, save_report)
    except KeyboardInterrupt:
        return _INTERRUPTION
    except OSError as error:
        return f"failed, {error}"
    return None


def _write(save_report: Callable[[], Sequence[Path]], console: Console) -> bool:
    """Writes the results and their page, and says where; whether the results could be written."""
    try:
        paths = save_report()
    except OSError as error:
        console.print(f"failed: the results were not written: {error}", markup=False, highlight=False, soft_wrap=True)
        return False
    console.print("wrote " + " and ".join(map(str, paths)), markup=False, highlight=False, soft_wrap=True)
    for line in _html_report(paths[0]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return True


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and returns the exit code.

    0; 1 if anything failed or --fail-if-slower had nothing to compare, 2 for bad usage, 3 if slower than an earlier
    run, 4 on a busy machine, 130 if interrupted.
    """
    made = parser()
    options = made.parse_args(argv)
    if options.fail_if_slower and options.compare is None:
        made.error("--fail-if-slower: than what? name an earlier run by --compare")
    if reason := _missing_device(options.device):
        made.error(f"--device {options.device}: {reason}")
    try:
        check_writable(options.out)
    except OSError as error:
        made.error(f"--out {options.out}: cannot write results there: {error.strerror}")
    try:
        options.checkpoint = options.checkpoint and checkpoint.read(options.checkpoint)
        plans, left_out = installed(plan(options))
        old = options.compare and compare.read(options.compare, machine.identity(), options.threads, options.heap)
    except ValueError as error:
        made.error(str(error))
    cpus = machine.cores()[: options.threads]
    report = Report(about(options, cpus, argv), left_out=left_out)
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{machine.short_name()}"
    save_report = functools.partial(save, report, options.out, stem)
    ended = _measure(plans, Setup(cpus, options.device, options.heap), report, save_report)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    show(report, console)
    code = _compared(old, report, options, console) if old is not None else 0
    written = _write(save_report, console)
    if ended is not None:
        console.print(f"{ended}: the cases above are complete, the others were not measured", markup=False)
    if ended == _INTERRUPTION:
        return INTERRUPTED
    if report.failures or ended is not None or not written:
        return FAILED
    return code or (BUSY if options.strict and report.disturbances() else 0)


def _compared(old: Mapping[compare.Key, float], report: Report, options: argparse.Namespace, console: Console) -> int:
    """Shows what has changed. The exit code, where that was asked to matter: of a slower one of ours, or of none."""
    changes = compare.compare(old, report.rows, options.fail_if_slower or compare.THRESHOLD)
    show_changes(changes, compare.lost(old, changes), options.compare, console)
    if not options.fail_if_slower:
        return 0
    ours = [change for change in changes if change.ours]
    if not ours:
        console.print("[bold red]failed[/] --fail-if-slower: no row of ours was compared", highlight=False)
        return FAILED
    return SLOWER if any(change.verdict == compare.SLOWER for change in ours) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
