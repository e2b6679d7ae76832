"""Fixtures of the op tests."""

import pytest

import hbert_kernels as hk


@pytest.fixture
def reference():
    """The reference path, whatever has been compiled."""
    with hk.use_backend("reference"):
        yield
