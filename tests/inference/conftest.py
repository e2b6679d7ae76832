"""Fixtures of the inference tests."""

import sys
from pathlib import Path

import pytest
import torch

for folder in ("models", "patching", "convert"):
    sys.path.append(str(Path(__file__).parents[1] / folder))

from convert_checkpoint import minilm  # noqa: E402, F401


@pytest.fixture(autouse=True)
def one_thread(reproducible_and_poisoned):
    torch.set_num_threads(1)
