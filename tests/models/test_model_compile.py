"""torch.compile over the static layout, torch.export over the dense one."""

from __future__ import annotations

import pytest
import torch
from model_helpers import batch, dense_twin, small_masked_lm, small_model
from torch import nn


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_graph_compiles(masked):
    model = small_masked_lm(layer_types="AS", conv_kernel_size=3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = batch()
    mask = mask if masked else None
    with torch.no_grad():
        got = compiled(ids, mask).logits
    torch.testing.assert_close(got, model(ids, mask).logits, rtol=1e-12, atol=1e-12)


def test_generated_code_gives_the_same_logits():
    """Through inductor, the default, as users have it: with its fusions, and our ops in between."""
    model = small_masked_lm(layer_types="AS", conv_kernel_size=3)
    compiled = torch.compile(model, fullgraph=True)
    ids, mask = batch()
    for given in (None, mask):
        with torch.no_grad():
            got = compiled(ids, given).logits
        torch.testing.assert_close(got, model(ids, given).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("style", ["sub_ln", "merge"])
def test_a_compiled_training_step_equals_the_eager_one(style):
    model = small_masked_lm(norm_style=style, layer_types="AS").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = batch()
    labels = ids.masked_fill(~mask | (ids % 3 == 0), -100)
    parameters = list(model.parameters())
    got, expected = compiled(ids, mask, labels=labels), model(ids, mask, labels=labels)
    assert got.num_masked == expected.num_masked and got.num_correct == expected.num_correct
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    grads = zip(torch.autograd.grad(got.loss, parameters), torch.autograd.grad(expected.loss, parameters), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_another_mask_does_not_recompile():
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in range(4):
            ids, mask = batch(seed=seed)
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                got = compiled(ids, mask).last_hidden_state
            torch.testing.assert_close(got, model(ids, mask).last_hidden_state, rtol=1e-12, atol=1e-12)


class Encoder(nn.Module):
    """Positional tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask).last_hidden_state


@pytest.mark.parametrize(
    "fields",
    [{"layer_types": "AS", "conv_kernel_size": 3}, {"norm_style": "merge", "scorer": "per_head"}],
    ids=["sub_ln", "merge"],
)
def test_the_dense_form_exports_with_dynamic_shapes_and_without_our_ops(fields):
    model = dense_twin(small_model(**fields))
    ids, mask = batch(rows=3, length=9)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=2, max=48)}
    program = torch.export.export(Encoder(model), (ids, mask), dynamic_shapes=(sizes, sizes))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not [name for name in names if "hbert" in name]
    ids, mask = batch(rows=5, length=7, seed=4)
    expected = model(ids, mask).last_hidden_state
    torch.testing.assert_close(program.module()(ids, mask), expected, rtol=1e-12, atol=1e-12)
