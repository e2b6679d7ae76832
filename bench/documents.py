"""Tables of docs/ and README from the results that are kept in docs/results; `--measure NAME` takes one of them again.

A page has a block for each table: a line `<!-- table: NAME -->`, the table, `<!-- end -->`. Whatever stands between is
written anew, and no figure in it by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.compare import is_ours
from bench.pretraining import minilm
from bench.pretraining.plan import MINILM
from bench.report.markdown import brief, lost, tables
from bench.report.results import Results, read_results
from hbert.data.storage import replacing
from hbert.errors import HbertError
from hbert.processor import label
from hbert.revision import git_revision

README = machine.ROOT / "README.md"
DOCS = machine.ROOT / "docs"
RESULTS = DOCS / "results" / "bench"
_END = "<!-- end -->"
_BLOCK = re.compile(rf"(?<=<!-- table: )(\S+)( -->\n)(.*?)(?={_END})", re.DOTALL)
# What a page needs of a run's JSON file; the calls of every round stay behind.
_KEPT = ("about", "failures", "left_out", "disturbances", "dropped")
_BERTS = "hf,hf-compile"
# Name, case, models, peers by dtype. All models of a case are in memory at once, and more of base size do not fit into
# 24 GiB: hf-fp32 has a table of its own there.
_TRAINED = (
    (
        "4x256",
        "--size 4x256 --shapes 32x128 --models hbert-v1,hbert-v2,hbert-v1c,hbert-vanilla",
        {"fp32": _BERTS, "bf16": f"{_BERTS},hf-fp32"},
    ),
    ("base", "--size base --shapes 8x128 --models hbert-v1,hbert-vanilla", {"fp32": _BERTS, "bf16": _BERTS}),
    ("base-from-fp32", "--size base --shapes 8x128 --models hbert-v1", {"bf16": "hf-fp32,hf-compile"}),
)
_OF_MODELS, _OF_OPS = "inference.md", "kernels.md"
_WITH_LOSSES = (_OF_MODELS, _OF_OPS)
# What README shows of the table of latencies.
_IN_BRIEF = "hbert-v2+optimize"
_ENGINES = "hbert-v1+optimize,hbert-v2+optimize,hbert-additive-c+optimize,bert+optimize"


@dataclass(frozen=True)
class Measured:
    """A table of bench/run.py: the page that shows it, and the arguments that measure it."""

    page: str
    arguments: str


_LENGTHS = ",".join(f"1x{2**power}" for power in range(4, 12))
_A_AND_S = "hbert-additive+optimize,hbert-additive-c+optimize,hbert-vanilla+optimize"
_OTHERS = "--suite latency --shapes 1x128,8x128 --models hbert-v2+optimize,bert+optimize"
_PADDED = "--suite varlen --shapes 16x128,8x512 --models"
_MINILM = f"--suite varlen,latency --checkpoint {MINILM} --shapes 16x128,64x128 --models bert+optimize,bert+patch"


# bfloat16 has tables of its own: only processors that have its products can say something of it.
MEASURED = {
    "kernels": Measured(_OF_OPS, "--suite kernels --dtype fp32"),
    "kernels-bf16": Measured(_OF_OPS, "--suite kernels --dtype bf16"),
    **{
        f"latency-{dtype}": Measured(
            _OF_MODELS, f"--suite latency --dtype {dtype} --shapes 1x16,1x128,8x128,1x512 --models {_ENGINES}"
        )
        for dtype in ("fp32", "bf16", "int8")
    },
    "peers": Measured(_OF_MODELS, f"{_OTHERS},bert+patch --dtype fp32 --peers hf,hf-compile,hf-compile-freeze"),
    "peers-int8": Measured(_OF_MODELS, f"{_OTHERS} --dtype int8 --peers torchao-int8,ct2-int8"),
    "long": Measured(_OF_MODELS, f"--suite latency --dtype bf16,int8 --shapes 1x2048 --models {_ENGINES}"),
    "crossover": Measured(
        _OF_MODELS, f"--suite latency --dtype bf16 --shapes {_LENGTHS} --models {_A_AND_S} --peers hf --min-time 2"
    ),
    "varlen-fp32": Measured(_OF_MODELS, f"{_PADDED} {_ENGINES},bert+patch --dtype fp32"),
    "varlen-bf16": Measured(_OF_MODELS, f"{_PADDED} {_ENGINES},bert+patch --dtype bf16"),
    "varlen-int8": Measured(_OF_MODELS, f"{_PADDED} {_ENGINES} --dtype int8"),
    "minilm": Measured(_OF_MODELS, f"{_MINILM} --dtype fp32,int8"),
    "minilm-bf16": Measured(_OF_MODELS, f"{_MINILM} --dtype bf16"),
    **{
        f"training-{name}-{heap}{'' if dtype == 'fp32' else f'-{dtype}'}": Measured(
            "results-pretraining.md",
            f"--suite throughput {models} --peers {among} --heap {heap} --min-time 8 --dtype {dtype}",
        )
        for name, models, peers in _TRAINED
        for heap in ("ours", "all")
        for dtype, among in peers.items()
    },
}


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.documents", description=__doc__.split("\n")[0])
    parser.add_argument("--measure", choices=MEASURED, help="run bench/run.py for this table first, on a quiet machine")
    options = parser.parse_args(argv)
    try:
        if options.measure:
            measure(options.measure)
        for page, blocks in measured_blocks().items():
            rewrite(page, blocks)
    except HbertError as error:
        parser.error(str(error))
    return 0


def measure(name: str) -> None:
    """Runs bench/run.py and keeps what it found as docs/results/bench/NAME-ISA.csv and .json.

    Raises:
        HbertError: the sources are not those of a commit; the run failed, or the machine was busy: nothing is kept.
    """
    _check_revision(name, git_revision(machine.ROOT) or "unknown")
    if MINILM in MEASURED[name].arguments:
        minilm.unpack(machine.ROOT / MINILM)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "bench/run.py", *MEASURED[name].arguments.split(), "--strict", "--out", folder]
        if code := subprocess.run(command, cwd=machine.ROOT, check=False).returncode:
            raise HbertError(f"{name} is not kept: bench/run.py ended with exit code {code}")
        (path,) = Path(folder).glob("*.csv")
        keep(name, path)


def keep(name: str, path: Path) -> Path:
    """Copies a CSV of bench/run.py, and what matters of the JSON file beside it, into docs/results/bench.

    Raises:
        HbertError: a file cannot be read, is not one of bench/run.py, or is of other sources than a commit's or of
            another command than the table's: nothing is kept.
    """
    rows = read_results(path).rows
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    record = {key: record[key] for key in _KEPT if key in record}
    command = record["about"]["command"] = _portable(record["about"]["command"])
    if shlex.split(command) != (wanted := ["python", "bench/run.py", *MEASURED[name].arguments.split()]):
        raise HbertError(f"{name} is not kept: {path.name} is of `{command}`, not of `{shlex.join(wanted)}`")
    for revision in {row.cells.get("git", "") for row in rows}:
        _check_revision(name, revision)
    # Rows of torch name the level of torch, which may be another one.
    levels = {row.cells.get("isa", "") for row in rows if is_ours(row.cells["suite"], row.cells["candidate"])}
    target = RESULTS / f"{name}-{max(levels, key=len, default='')}.csv"
    for file, text in ((target.with_suffix(".json"), json.dumps(record, indent=1) + "\n"), (target, path.read_text())):
        with replacing(file) as temporary:
            temporary.write_text(text)
    return target


def _check_revision(name: str, revision: str) -> None:
    if "-dirty" in revision:
        raise HbertError(f"{name} is not kept: its sources would be those of no commit ({revision}); commit them first")


def measured_blocks() -> dict[Path, dict[str, str]]:
    """The block of every CSV in docs/results/bench, by the page that shows it; README has some of them in brief.

    The pages of the models and of the ops also have a block of all that was lost in their tables.

    Raises:
        HbertError: a file cannot be read, or is not one of bench/run.py.
    """
    pages: dict[Path, dict[str, str]] = {}
    shown: dict[str, dict[str, Results]] = {}
    in_brief = set(names(README.read_text(encoding="utf-8")))
    for path in sorted(RESULTS.glob("*.csv")):
        name, results = path.stem.rsplit("-", 1)[0], read_results(path)
        page = MEASURED[name].page
        pages.setdefault(DOCS / page, {})[path.stem] = measured_block(results)
        if path.stem in in_brief:
            pages.setdefault(README, {})[path.stem] = brief(results, _IN_BRIEF)
        if page in _WITH_LOSSES:
            shown.setdefault(page, {})[path.stem] = results
    for page, of_page in shown.items():
        pages[DOCS / page]["losses"] = lost(of_page)
    return pages


def _portable(command: str) -> str:
    """Without the folder of the results, which is one of this machine, and what changes no figure."""
    words = shlex.split(command)
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return shlex.join(word for word in words if word != "--strict")


def measured_block(results: Results) -> str:
    """The tables of a run under the line that says how, where and when it was measured."""
    about = results.about
    where = [
        label(about),
        about.get("isa", ""),
        f"{about['threads']} pinned threads",
        f"torch {about['torch']}",
        f"heap kept: {about['heap_kept']}",
        f"commit {about['git']}",
        about["date"][:10],
    ]
    lines = [
        f"`{about['command']}`",
        "; ".join(filter(None, where)) + f"; {results.dropped:,} disturbed slices were dropped and taken again.",
    ]
    lines += [f"Not measured: {reason}." for reason in (*results.failures, *results.left_out)]
    lines += [f"**The machine was busy**: {reason}." for reason in results.busy]
    return "\n".join(lines) + f"\n\n{tables(results)}"


def rewrite(page: Path, blocks: Mapping[str, str]) -> None:
    """Puts each block in its place in the page; those that it has besides stay as they are.

    A result of a level that the page does not have yet gets a place behind those of its table.

    Raises:
        HbertError: the page has no place for a block, or cannot be read or written.
    """
    try:
        old = page.read_text(encoding="utf-8")
        placed = _with_places(old, blocks)
        if homeless := sorted(set(blocks) - set(names(placed))):
            raise HbertError(f"{page} has no lines <!-- table: NAME --> and <!-- end --> for {', '.join(homeless)}")
        if (new := fill(placed, blocks)) != old:
            with replacing(page) as temporary:
                temporary.write_text(new, encoding="utf-8")
    except OSError as error:
        raise HbertError(f"{page}: {error}") from error


def _with_places(text: str, blocks: Iterable[str]) -> str:
    """The text of a page with an empty block for each kept result that has none, behind the last one of its table."""
    for stem in sorted(set(blocks) - set(names(text))):
        table = stem.rsplit("-", 1)[0]
        places = [match for match in _BLOCK.finditer(text) if match[1].rsplit("-", 1)[0] == table]
        if table in MEASURED and places:
            end = places[-1].end() + len(f"{_END}\n")
            text = f"{text[:end]}\n<!-- table: {stem} -->\n{_END}\n{text[end:]}"
    return text


def keep_figure(drawn: Path, target: Path) -> None:
    """Copies a figure to where a page has it.

    Raises:
        OSError: a file cannot be read or written.
    """
    with replacing(target) as temporary:
        shutil.copyfile(drawn, temporary)


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """The text of a page with these blocks in their places."""

    def filled(match: re.Match[str]) -> str:
        name, mark, old = match.groups()
        return f"{name}{mark}{blocks[name].strip()}\n" if name in blocks else f"{name}{mark}{old}"

    return _BLOCK.sub(filled, text)


def names(text: str) -> list[str]:
    """The names of a page's blocks."""
    return [match[1] for match in _BLOCK.finditer(text)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
