"""Adapters in the place of linear layers: called wherever the layer would be, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import batch, dense_twin, small_masked_lm, small_model, with_adapter
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

IGNORED = -100
TARGETS = {
    "sub_ln": ("0.attention.query", "0.attention.key", "0.attention.transform", "0.ffn.fc1", "0.ffn.fc2")
    + ("1.attention.qkv", "1.attention.out"),
    "merge": ("0.attention.key", "0.merge.out", "1.ffn.fc1", "1.ffn.fc2"),
}


def merged(model, name):
    """The model with the adapter's product added to the weight below it."""
    twin = copy.deepcopy(model)
    adapter = twin.get_submodule(name)
    with torch.no_grad():
        adapter.base_layer.weight.add_(adapter.lora_B.weight @ adapter.lora_A.weight)
    twin.set_submodule(name, adapter.base_layer)
    return twin


@pytest.mark.parametrize("scorer", ["dense", "per_head"])
@pytest.mark.parametrize(("style", "name"), [(style, name) for style, names in TARGETS.items() for name in names])
def test_an_adapter_computes_what_merged_weights_do_and_learns(style, name, scorer):
    model = small_model(norm_style=style, scorer=scorer)
    before = model(*batch()).last_hidden_state
    adapter = with_adapter(model, f"layers.{name}")
    found = model(*batch()).last_hidden_state
    assert (found - before).norm() > 1e-3 * before.norm()
    expected = merged(model, f"layers.{name}")(*batch()).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense_twin(model)(*batch()).last_hidden_state, expected, rtol=1e-9, atol=1e-9)
    found.square().sum().backward()
    assert all(part.weight.grad.any() for part in (adapter.lora_A, adapter.lora_B))


@pytest.mark.parametrize("length", [7, 45])  # both forms of additive attention, of which an adapter has one
def test_an_adapter_of_the_key_under_autocast(length):
    model = small_model(dtype=torch.float32)
    with_adapter(model, "layers.0.attention.key")
    inputs = batch(rows=2, length=length)
    exact = model(*inputs).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs).last_hidden_state
    assert 0 < (found.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["query_att", "key_att"])
def test_scorers_take_no_adapter(name):
    model = small_model()
    with_adapter(model, f"layers.0.attention.{name}")
    with pytest.raises(TypeError, match=f"{name} is a LoraLinear of model_helpers, .* leave scorers out of adapters"):
        model(*batch())


@pytest.mark.parametrize("name", ["query_att", "key_att", "key"])
@pytest.mark.parametrize("scorer", ["dense", "per_head"])
def test_parametrized_weights_are_read(scorer, name):
    model = small_model(scorer=scorer)
    expected = model(*batch(rows=2, length=45)).last_hidden_state
    weight_norm(model.layers[0].attention.get_submodule(name))
    found = model(*batch(rows=2, length=45)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def moved(module, name="weight"):
    """Prunes a parameter, and moves what is left of it behind the back of the hook."""
    prune.l1_unstructured(module, name, 0.3)
    with torch.no_grad():
        getattr(module, f"{name}_orig").mul_(-3).add_(0.1)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("layers.0.attention.key", "weight"), ("layers.0.attention.key", "bias"), ("layers.0.attention_norm", "weight")]
    + [("layers.1.attention_norm", "weight"), ("norm", "bias")],
)
@pytest.mark.parametrize("style", ["sub_ln", "post_ln"])
def test_parameters_that_a_hook_computes_are_those_of_this_call(style, name, parameter):
    model = small_model(norm_style=style)
    if style == "post_ln" and name == "norm":
        name = "layers.1.ffn_norm"
    for length in (7, 45):  # both forms of additive attention
        moved(model.get_submodule(name), parameter)
        found = model(*batch(rows=2, length=length)).last_hidden_state
        prune.remove(model.get_submodule(name), parameter)
        expected = model(*batch(rows=2, length=length)).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["query_att", "key_att", "norm"])
@pytest.mark.parametrize("scorer", ["dense", "per_head"])
def test_parameters_that_are_read_may_not_come_from_a_hook(scorer, name):
    model = small_model(scorer=scorer)
    moved(model.get_submodule(f"layers.0.attention.{name}"))
    with pytest.raises(TypeError, match=f"a hook computes parameters of {name}, .*prune.remove"):
        model(*batch())
    prune.remove(model.get_submodule(f"layers.0.attention.{name}"), "weight")
    model(*batch())


def test_a_decoder_whose_weight_a_hook_computes():
    model = small_masked_lm(tie_word_embeddings=False).train()
    moved(model.head.decoder)
    ids, _ = batch()
    found = model(ids, labels=ids).loss
    prune.remove(model.head.decoder, "weight")
    torch.testing.assert_close(found, model(ids, labels=ids).loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("divisor", [None, 7])
def test_an_adapter_of_the_decoder(divisor):
    model = small_masked_lm(tie_word_embeddings=False).train()
    adapter = with_adapter(model, "head.decoder")
    ids, mask = batch()
    labels = torch.where(mask & (ids % 2 == 0), ids, IGNORED)
    found = model(ids, mask, labels=labels, num_masked=divisor)
    expected = merged(model, "head.decoder")(ids, mask, labels=labels, num_masked=divisor)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=1e-9)
    assert found.num_correct == expected.num_correct and found.num_masked == expected.num_masked > 0
    found.loss.backward()
    assert all(part.weight.grad.any() for part in (adapter.lora_A, adapter.lora_B))
    nothing = model(ids, mask, labels=torch.full_like(ids, IGNORED))
    assert nothing.loss == 0
