"""Softmax weights that underflow into denormal numbers: zeros on x86-64, where these are multiplied slowly."""

import math
import platform
import sys

import pytest
import torch

import hbert_kernels as hk

FLUSHED = platform.machine().lower() in ("x86_64", "amd64")
TINY = math.exp(-92)  # of two tokens one has this weight, and 1e30 for a value
CU_SEQLENS = torch.tensor([0, 2], dtype=torch.int32)


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    monkeypatch.setattr(sys.modules[hk.attention.__module__], "_SCALAR", False)
    with hk.use_backend("cpp"):
        yield
    # The thread has its own setting back.
    assert (torch.full((32,), 1e-40) * 1.0 > 0).all()


def assert_flushed(found, weight):
    assert found == 0 if FLUSHED else math.isclose(found, weight, rel_tol=1e-3)


def test_attention():
    qkv = torch.zeros(2, 24)
    qkv[0, 0], qkv[1, 8], qkv[1, 16] = 10 * 8**0.5, -9.2, 1e30
    qkv.requires_grad_()
    out = hk.attention(qkv, CU_SEQLENS, 2, 1)
    assert_flushed(out[0, 0].item(), TINY * 1e30)
    out[0, 0].backward()
    assert_flushed(qkv.grad[1, 16].item(), TINY)


def test_additive_pool():
    x, scorer = torch.zeros(2, 8), torch.zeros(1, 8)
    x[1, 0], x[1, 7], scorer[0, 0] = -92.0, 1e30, 8**0.5
    x.requires_grad_()
    pooled = hk.additive_pool(x, scorer, CU_SEQLENS, 2, 1)
    assert_flushed(pooled[0, 7].item(), TINY * 1e30)
    pooled[0, 7].backward()
    assert_flushed(x.grad[1, 7].item(), TINY)


def test_masked_lm_loss():
    hidden, weight = torch.zeros(1, 4), torch.zeros(2, 4)
    hidden[0, 0], weight[1, 0] = 1.0, -92.0
    weight.requires_grad_()
    loss, _ = hk.masked_lm_loss(hidden, weight, None, torch.tensor([0]))
    loss.backward()
    assert_flushed(weight.grad[1, 0].item(), TINY)
