"""Encoders run as programs: the same bits as with their ops called one by one."""

from __future__ import annotations

import pytest
import torch
from model_helpers import all_variants, batch, small_model, variant_name

from hbert import optimize
from hbert.inference.kernels import runs_compiled
from hbert.inference.linear import own_product_is_faster


def is_recorded(dtype: str) -> bool:
    """Where oneDNN multiplies, or some op has no compiled kernel, ops are called one by one."""
    storage = torch.bfloat16 if dtype == "bf16" else torch.float32
    return runs_compiled(torch.zeros(1, 12, dtype=storage)) and (dtype == "int8" or own_product_is_faster())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("fields", all_variants(), ids=variant_name)
def test_a_recording_gives_the_bits_of_its_ops_for_every_batch(fields, dtype):
    fast = optimize(small_model(dtype=torch.float32, **fields), dtype)
    # A recording for short sequences and one for long ones: each runs on a batch that it was not made of, too.
    batches = [batch(), batch(rows=2, length=45), batch(rows=5, length=7, seed=1), batch(rows=1, length=48, seed=2)]
    found = [fast(*inputs, output_hidden_states=True).hidden_states for inputs in batches]
    assert bool(fast._programs) == is_recorded(dtype)
    fast._is_recordable = False
    for inputs, states in zip(batches, found, strict=True):
        expected = fast(*inputs, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
