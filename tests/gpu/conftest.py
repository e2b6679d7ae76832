"""Triton kernels run in the interpreter on CPU tensors, every launch checked (triton_interpreter.py).

What a machine lacks, a toolkit or Triton, is not tested there, and the header of the test run says so.
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from cuda_shim_build import find_cuda_home

BUDGET_TRITON = json.loads(Path(__file__).with_name("triton_budget.json").read_text())["triton"]["version"]


def triton_version():
    """Without importing it, which has to wait for triton_interpreter; None for a Triton of another name, as ROCm's."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


MISSING = {}
if importlib.util.find_spec("triton") is None:
    MISSING["test_triton_*.py"] = "Triton"
elif triton_version() != BUDGET_TRITON:
    MISSING["test_triton_aot.py"] = f"Triton {BUDGET_TRITON}, whose registers the budget counts,"
if find_cuda_home() is None:
    MISSING["test_cuda_*.py"] = "a CUDA toolkit"
collect_ignore_glob = list(MISSING)

if "test_triton_*.py" not in MISSING:
    from triton_interpreter import checked  # before every module with @triton.jit


def pytest_report_header():
    return [f"tests/gpu: {pattern} left out, {what} is not installed" for pattern, what in MISSING.items()]


@pytest.fixture(autouse=True)
def launches(request):
    """The checked launches of a Triton test; one thread, since the interpreter runs on one."""
    if not request.path.name.startswith("test_triton_"):
        yield None
        return
    torch.set_num_threads(1)
    with checked() as record:
        yield record
