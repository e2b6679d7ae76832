"""Fixtures of the op tests."""

import pytest
import torch

import hbert_kernels as hk


@pytest.fixture
def reference():
    """The reference path, whatever has been compiled, on one thread: loops over tiny tensors only wait for a second."""
    torch.set_num_threads(1)
    with hk.use_backend("reference"):
        yield
