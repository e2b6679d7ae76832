"""Fixtures of the conversion tests."""

import pytest
import torch
from convert_checkpoint import minilm  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread(reproducible_and_poisoned):
    torch.set_num_threads(1)
