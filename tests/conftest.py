"""Fixtures of the whole suite."""

import os

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


@pytest.fixture(autouse=True)
def reproducible_and_poisoned():
    """Fixed seed and threads; memory that torch hands out uninitialised holds NaN: no kernel can lean on it."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
