"""Triton kernels run in the interpreter on CPU tensors, every launch checked (triton_interpreter.py)."""

import pytest
import torch
from triton_interpreter import checked  # before every module with @triton.jit


@pytest.fixture(autouse=True)
def launches():
    """The checked launches of the test; one thread, since the interpreter runs on one."""
    torch.set_num_threads(1)
    with checked() as record:
        yield record
