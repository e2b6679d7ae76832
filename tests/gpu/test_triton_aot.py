"""The Triton kernels compiled ahead of time: registers, spills, shared memory, wide loads (aot_compile.py).

Their budget (triton_budget.json) is for the version of Triton that it names; conftest.py leaves this file out beside
another one. ``spills`` and ``narrow`` excuse kernels, each with the reason; ``python tests/gpu/aot_compile.py --write``
measures ``registers`` again.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbert_kernels.triton.limits import POOL_SHARED_BYTES

HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "triton_budget.json").read_text())
SLACK = 1.2  # registers move with every version of the compiler
# Bytes that a program can have.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
ACTIVATIONS = {"X", "DY", "DTOTAL", "RESIDUAL", "LOGITS"}  # arguments of kernels
SHORT = ["sm_90 aligned base", "gfx942 aligned base-one-each"]
ALIGNED = [f"{architecture} aligned full" for architecture in SHARED_LIMIT]
UNALIGNED = [f"{architecture} unaligned common" for architecture in SHARED_LIMIT]


def in_full(run):
    return pytest.param(run, marks=pytest.mark.gpu_full)


each_run = pytest.mark.parametrize("run", [*SHORT, *map(in_full, [*ALIGNED, *UNALIGNED])])


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Runs a program of this folder, without the interpreter; what it prints."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def output(name, *arguments):
        command = [sys.executable, str(HERE / name), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return output


@pytest.fixture(scope="session")
def compiled(program):
    """Resources by the kernel's title, of a run: an architecture, an alignment and problems."""
    return functools.cache(lambda run: json.loads(program("aot_compile.py", *run.split())))


def excused(entry, run, title):
    """Each word of the budget's entry is one of the run or of the kernel's title."""
    return set(entry.split()) <= {*run.split(), *title.split()}


def assert_excused(kind, run, offenders):
    for title in offenders:
        assert any(excused(entry, run, title) for entry in BUDGET[kind]), title


def spilling(measured):
    return [title for title, used in measured.items() if used["spilled"]]


def narrow(measured):
    """Kernels with a load of activations below 16 bytes."""
    return [title for title, used in measured.items() if any(size < 16 for size in used["loads"].values())]


@each_run
def test_registers_are_within_the_budget(compiled, run):
    name = " ".join(run.split()[:2])
    for title, used in compiled(run).items():
        assert used["registers"] <= SLACK * BUDGET["registers"][title][name], title


@each_run
def test_nothing_spills(compiled, run):
    assert_excused("spills", run, spilling(compiled(run)))


@each_run
def test_shared_memory_suffices(compiled, run):
    architecture = run.split()[0]
    for title, used in compiled(run).items():
        limit = POOL_SHARED_BYTES if architecture != "gfx942" and "pool_chunk" in title else SHARED_LIMIT[architecture]
        assert used["shared"] <= limit, title


@each_run
def test_loads_of_activations_are_found(compiled, run):
    """Or the checks below would miss some."""
    names = {"x": "X", "row": "LOGITS"}  # of helpers for their argument
    for title, used in compiled(run).items():
        arguments = {word.partition(":")[0] for word in title.split()}
        assert {names.get(n, n) for n in used["loads"]} == ACTIVATIONS & arguments, title


@pytest.mark.parametrize("run", [*SHORT, *map(in_full, ALIGNED)])
def test_aligned_activations_take_16_byte_loads(compiled, run):
    assert_excused("narrow", run, narrow(compiled(run)))


@pytest.mark.gpu_full
@pytest.mark.parametrize("run", UNALIGNED)
def test_unaligned_activations_cannot(compiled, run):
    """Or the check above would not see a narrow load."""
    measured = compiled(run)
    assert narrow(measured) == [title for title, used in measured.items() if used["loads"]]


@pytest.mark.gpu_full
@pytest.mark.parametrize("run", [*ALIGNED, *UNALIGNED])
def test_the_budget_has_nothing_else(compiled, run):
    name = " ".join(run.split()[:2])
    assert compiled(run).keys() == {title for title, runs in BUDGET["registers"].items() if name in runs}


@pytest.mark.gpu_full
@pytest.mark.parametrize(
    ("kind", "offenders", "runs"), [("spills", spilling, [*ALIGNED, *UNALIGNED]), ("narrow", narrow, ALIGNED)]
)
def test_every_exception_is_needed(compiled, kind, offenders, runs):
    found = [(run, title) for run in runs for title in offenders(compiled(run))]
    for entry in BUDGET[kind]:
        assert any(excused(entry, run, title) for run, title in found), entry


@pytest.mark.gpu_full
def test_the_document_shows_the_model(program):
    assert program("gpu_model.py") in (HERE.parents[1] / "docs/gpu-model.md").read_text()
