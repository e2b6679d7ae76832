"""The CUDA kernels on a CPU under the address, undefined-behaviour and thread sanitizers; these catch mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_shim_build import Fault, misuse_program, numpy_library

HERE = Path(__file__).parent
SEEDS = [1, 2, 3]
CAUGHT = {
    "race": "WARNING: ThreadSanitizer: data race",
    "outside": "ERROR: AddressSanitizer: heap-buffer-overflow|runtime error: index .* out of bounds",
    "misaligned": "runtime error: .* misaligned address",
    "divergence": "CUDA shim: barrier divergence",
    "lane": "CUDA shim: .*(waits for lane|beyond the block|lanes of its mask never come)",
    "result": "noticed in the result",
}


def runtime(name: str) -> str:
    """The path of a library of the compiler."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def environment(sanitizer: str, preload: bool) -> dict[str, str]:
    """For a process with that sanitizer; Python itself has none, so its runtime must come before all else."""
    libraries = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"], "plain": []}[sanitizer]
    return os.environ | {
        "LD_PRELOAD": " ".join(map(runtime, libraries)) if preload else "",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "OPENBLAS_NUM_THREADS": "1",
    }


def run_kernels(sanitizer: str, seed: int, *cases: str, fault: Fault | None = None) -> subprocess.CompletedProcess:
    """All kernels, or some cases of cuda_numpy_driver.py, under a sanitizer and a schedule."""
    command = [sys.executable, HERE / "cuda_numpy_driver.py", numpy_library(sanitizer, fault), str(seed), *cases]
    env = environment(sanitizer, preload=True)
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sanitizer", ["plain", "address"])
def test_kernels_are_clean(sanitizer, seed):
    result = run_kernels(sanitizer, seed)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("seed", [SEEDS[0], *(pytest.param(s, marks=pytest.mark.gpu_full) for s in SEEDS[1:])])
def test_kernels_have_no_race(seed):
    result = run_kernels("thread", seed)
    assert result.returncode == 0, result.stderr[-4000:]


BARRIER = "  __syncthreads();\n"
# Each with a sanitizer, a case of the driver, and what reports it. Those in slot_sums.cu compile in a second.
FAULTS = [
    (Fault("sum_barrier", "slot_sums.cu", BARRIER, "", "slot_sums.cu"), "thread", "plain", "race"),
    (
        Fault("sum_end", "slot_sums.cu", "if (column < sum.width)", "if (column <= sum.width)", "slot_sums.cu"),
        "address", "plain", "outside",
    ),
    (
        Fault("alignment", "values.h", "(p) % 16 == 0;", "(p) % 4 == 0;", "row_norm.cu"),
        "address", "unaligned", "misaligned",
    ),
]  # fmt: skip
ROW_BARRIER = Fault("row_barrier", "row_norm.h", BARRIER, "", "row_norm.cu")
POOL_BARRIER = Fault(
    "pool_barrier", "additive_pool.cu", f"{BARRIER}  exponentiate", "  exponentiate", "additive_pool.cu"
)
MORE_FAULTS = [
    (ROW_BARRIER, "thread", "plain", "race"),
    (POOL_BARRIER, "thread", "pool_dense", "race"),
    (
        Fault("row_end", "values.h", "out[k] = first + k < width ?", "out[k] = first + k <= width ?", "row_norm.cu"),
        "address", "activation", "outside",
    ),
    (
        Fault("shared_end", "additive_pool.h", "(float) * kPoolChunk", "(float) * 63", "additive_pool.cu"),
        "address", "pool_dense", "outside",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "sanitizer", "case", "reported"),
    [*FAULTS, *(pytest.param(*row, marks=pytest.mark.gpu_full) for row in MORE_FAULTS)],
    ids=[row[0].name for row in [*FAULTS, *MORE_FAULTS]],
)
def test_faults_in_the_kernels_are_caught(fault, sanitizer, case, reported):
    result = run_kernels(sanitizer, 1, case, fault=fault)
    assert result.returncode != 0
    assert re.search(CAUGHT[reported], result.stderr), result.stderr[-4000:]


@pytest.mark.gpu_full
@pytest.mark.parametrize(("fault", "case"), [(ROW_BARRIER, "plain"), (POOL_BARRIER, "pool_dense")])
def test_a_missing_barrier_gives_wrong_values(fault, case):
    results = [run_kernels("plain", seed, case, fault=fault) for seed in SEEDS]
    assert any("wrong by" in result.stderr for result in results)


MISUSES = [
    ("divergent_barrier", "plain", "divergence"),
    ("exit_before_barrier", "plain", "divergence"),
    ("divergent_shuffle", "plain", "lane"),
    ("shuffle_beyond_the_block", "plain", "lane"),
    ("uninitialised_shared", "plain", "result"),
    ("implicit_warp_order", "plain", "result"),
    ("too_many_threads", "plain", "result"),
    ("outside_static_shared", "address", "outside"),
    ("outside_dynamic_shared", "address", "outside"),
    ("implicit_warp_order", "thread", "race"),
    ("missing_fence", "thread", "race"),
    ("missing_atomic", "thread", "race"),
]


@pytest.mark.parametrize(("case", "sanitizer", "reported"), MISUSES)
def test_misuse_is_caught(case, sanitizer, reported):
    command = [misuse_program(sanitizer), case]
    env = environment(sanitizer, preload=False)
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode != 0
    assert re.search(CAUGHT[reported], result.stderr), result.stderr[-4000:]


@pytest.mark.parametrize("sanitizer", ["plain", "address", "thread"])
def test_what_is_right_passes(sanitizer):
    env = environment(sanitizer, preload=False)
    result = subprocess.run([misuse_program(sanitizer), "right"], capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
