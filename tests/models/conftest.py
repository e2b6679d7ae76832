"""Fixtures of the model tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(reproducible_and_poisoned):
    """Tensors of a few hundred numbers: a second thread would only wait for the first."""
    torch.set_num_threads(1)
