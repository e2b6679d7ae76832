"""Fixtures of the whole suite."""

import os
import sys

# Before torch starts its threads: where cores are shared, one that spins while it waits takes the core from the other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Triton decides when it is first imported, which torch does too, whether tests/gpu can interpret kernels.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# The same examples in every run: a red build must mean that the code changed.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
hypothesis.settings.load_profile("reproducible")


def pytest_report_header():
    from cpu_levels import LEFT_OUT

    return f"tests/test_levels.py: {', '.join(LEFT_OUT)} left out, of which this CPU has none" if LEFT_OUT else None


@pytest.fixture(autouse=True)
def reproducible_and_poisoned():
    """Fixed seed and threads; memory that torch hands out uninitialised holds NaN: no kernel can lean on it."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    _forget_mixed_precision()


def _forget_mixed_precision():
    """A Trainer in bf16 leaves autocast to every Accelerator that the process makes after it."""
    state = sys.modules.get("accelerate.state")
    if state is not None and state.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        state.AcceleratorState._reset_state(reset_partial_state=True)
