"""Fixtures of the patching tests."""

import sys
from pathlib import Path

import pytest
import torch

# The small models of every family and the real checkpoint are those of the conversion tests.
sys.path.append(str(Path(__file__).parents[1] / "convert"))

from convert_checkpoint import minilm  # noqa: E402, F401


@pytest.fixture(autouse=True)
def one_thread(reproducible_and_poisoned):
    torch.set_num_threads(1)
