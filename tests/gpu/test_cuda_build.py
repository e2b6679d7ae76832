"""The CUDA kernels compiled by nvcc: no spills, no stack, registers within the budget, 16-byte loads and stores."""

import json

import cuda_resources
import pytest

SLACK = 1.2
# One architecture compiles in half a minute.
each_architecture = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[] if a == "90" else pytest.mark.gpu_full) for a in cuda_resources.ARCHITECTURES],
)


@each_architecture
def test_resources_are_within_the_budget(architecture):
    budget = json.loads(cuda_resources.BUDGET.read_text())[architecture]
    usage = cuda_resources.usage(architecture)
    assert usage.keys() == budget.keys()
    for kernel, used in usage.items():
        assert used["registers"] <= SLACK * budget[kernel], kernel
        assert used["stack"] == used["local"] == 0, kernel
        assert used["shared"] <= 2048, kernel


@each_architecture
def test_aligned_rows_take_16_byte_instructions(architecture):
    narrow = ("merge_kernel", "slot_sums_kernel")  # neighbouring threads have neighbouring values
    for kernel, code in cuda_resources.instructions(architecture).items():
        if any(name in kernel for name in narrow) or ("additive_pool" in kernel and kernel.endswith(", 1>")):
            continue
        assert "LDG.E.128" in code, kernel
        assert "STG.E.128" in code, kernel


@each_architecture
def test_there_are_no_atomics(architecture):
    for kernel, code in cuda_resources.instructions(architecture).items():
        assert not [word for word in ("ATOM", "RED.") if word in code], kernel
