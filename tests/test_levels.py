"""Every instruction set level that this CPU has, each in its own process: it is chosen when the library loads.

What it lacks is left out, and the header of the test run says so; at its widest level runs the suite itself.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_levels import BELOW, NEEDED, OWN, flags

import hbert_kernels as hk
from hbert_kernels._dispatch import refusal
from hbert_kernels._library import CPU_CAPABILITIES

ROOT = Path(__file__).resolve().parents[1]
KERNEL_OPS = [op for op in hk.OPS if refusal(op, "cpp") is None]
KERNEL_TESTS = [f"tests/ops/test_{op}.py" for op in KERNEL_OPS if op != "add_layer_norm"]  # tested with layer_norm
INT8_TESTS = ["tests/ops/test_int8_linear.py"]
KERNEL_TESTS += [f"tests/ops/test_{name}.py" for name in ("denormals", "int8_norm", "packed_linear")] + INT8_TESTS
# What these levels add to the one below.
DOT_LEVELS = ("avx2_vnni", "avx512_vnni", "neon_dot")
# What no level changes: float64 has one code path for all, and the rest is about what surrounds the kernels.
THE_SAME_AT_ALL_LEVELS = " or ".join(
    ["float64", "formula", "gradcheck", "compile", "opcheck", "refuses", "autocast", "65536", "chunks"]
)


def run(level, *command):
    # Passive: a thread that spins while it waits takes the core from the one it waits for where cores are shared.
    environment = os.environ | {"HBERT_CPU_CAPABILITY": level, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


@functools.cache
def level_of_subprocess(cap):
    return run(cap, "-c", "import hbert_kernels; print(hbert_kernels.cpu_capability())").stdout.strip()


def levels_here():
    return [level for level in CPU_CAPABILITIES if level_of_subprocess(level) == level]


def test_the_cap_is_obeyed_and_never_exceeds_the_cpu():
    """The levels are those that Linux tells of, and a cap takes the widest of them up to it."""
    here = levels_here()
    for level, needed in NEEDED.items():
        assert (level in here) == (level in CPU_CAPABILITIES and flags() >= needed)
    assert here[: len(BELOW) + 1] == [*BELOW, OWN]
    for i, cap in enumerate(CPU_CAPABILITIES):
        assert level_of_subprocess(cap) == [level for level in CPU_CAPABILITIES[: i + 1] if level in here][-1]


def test_an_unknown_level_is_an_error():
    result = run("sse9", "-c", "import hbert_kernels; hbert_kernels.cpu_capability()")
    assert result.returncode != 0
    assert "HBERT_CPU_CAPABILITY='sse9' is unknown; allowed: scalar, avx2" in result.stderr


@pytest.mark.parametrize("level", BELOW)
def test_kernels_pass_at_every_level(level):
    chosen = ("-k", f"not ({THE_SAME_AT_ALL_LEVELS})", "-p", "no:cacheprovider")
    result = run(level, "-m", "pytest", *(INT8_TESTS if level in DOT_LEVELS else KERNEL_TESTS), *chosen)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_levels_agree():
    program = """
import torch, hbert_kernels as hk
torch.manual_seed(0)
x, residual = torch.randn(33, 100).bfloat16(), torch.randn(33, 100)
torch.save(hk.add_layer_norm(x, residual, torch.randn(100), torch.randn(100)), "/dev/stdout")
"""
    import io

    import torch

    outputs = []
    for level in levels_here():
        raw = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"HBERT_CPU_CAPABILITY": level}, cwd=ROOT,
            capture_output=True, check=True,
        ).stdout  # fmt: skip
        outputs.append(torch.load(io.BytesIO(raw)))
    for y, total in outputs[1:]:
        assert torch.equal(total, outputs[0][1])
        torch.testing.assert_close(y, outputs[0][0], rtol=2**-7, atol=2**-7)


def test_selftest_reports_success_at_this_level():
    result = run(hk.cpu_capability(), "-m", "hbert_kernels.selftest")
    assert result.returncode == 0, result.stdout
    for op in (*KERNEL_OPS, *hk.INFERENCE_OPS):
        assert f"\n{op:24s} cpp" in result.stdout
    assert " 0 failed" in result.stdout
