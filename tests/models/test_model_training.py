"""What training touches: dropout, gradient checkpointing, autocast, hidden states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_helpers import STYLES, batch, dense_twin, small_masked_lm, small_model

from hbert import HBertModel


def loss_and_gradients(model):
    ids, mask = batch(rows=5, length=7)
    labels = ids.masked_fill(~mask, -100)
    torch.manual_seed(11)
    loss = model(ids, mask, labels=labels).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_gradient_checkpointing_changes_no_bit(style, reentrant):
    conv = 3 if style in ("sub_ln", "pre_ln") else 0
    model = small_masked_lm(norm_style=style, layer_types="AAS", conv_kernel_size=conv, hidden_dropout_prob=0.2).train()
    calls = []
    model.hbert.layers[1].attention.register_forward_hook(lambda *_: calls.append(1))
    plain = loss_and_gradients(model)
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # autograd.grad is not allowed there
        ids, mask = batch(rows=5, length=7)
        torch.manual_seed(11)
        model(ids, mask, labels=ids.masked_fill(~mask, -100)).loss.backward()
        checkpointed = [plain[0], *(p.grad for p in model.parameters())]
    else:
        checkpointed = loss_and_gradients(model)
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_hidden_dropout_acts_in_training_only(style):
    model = small_model(norm_style=style, hidden_dropout_prob=0.5)
    ids, mask = batch()
    without = small_model(norm_style=style)(ids, mask).last_hidden_state
    assert torch.equal(model(ids, mask).last_hidden_state, without)
    model.train()
    torch.manual_seed(0)
    first = model(ids, mask).last_hidden_state
    torch.manual_seed(0)
    assert torch.equal(model(ids, mask).last_hidden_state, first)
    assert not torch.equal(model(ids, mask).last_hidden_state, first)
    assert not torch.allclose(first, without)


def test_dropout_follows_the_embeddings_and_every_branch():
    """With every branch dropped and the embeddings kept, a pre-norm stream never changes."""
    model = small_model(norm_style="sub_ln", layer_types="AS", hidden_dropout_prob=0.5).train()
    model.embeddings.dropout.p = 0.0
    for layer in model.layers:
        layer.dropout.p = 1.0
    ids, mask = batch()
    states = model(ids, mask, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[1])
    norm = model.norm
    expected = F.layer_norm(states[0], (12,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(states[-1][mask], expected[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dense", [False, True])
def test_attention_dropout_acts_on_self_attention_in_training_only(dense):
    model = small_model(layer_types="S", attention_probs_dropout_prob=0.5)
    additive = small_model(layer_types="A", attention_probs_dropout_prob=0.5).train()
    model, additive = (dense_twin(m) if dense else m for m in (model, additive))
    ids, mask = batch()
    assert torch.equal(model(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    model.train()
    assert not torch.equal(model(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    assert torch.equal(additive(ids, mask).last_hidden_state, additive(ids, mask).last_hidden_state)


@pytest.mark.parametrize("style", STYLES)
def test_autocast_runs_near_the_float32_model(style):
    model = small_masked_lm(norm_style=style, layer_types="AAS", dtype=torch.float32).train()
    plain = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_and_gradients(model)
    assert mixed[0].dtype == torch.float32
    torch.testing.assert_close(mixed[0], plain[0], rtol=0.02, atol=0)
    for parameter, a, b in zip(model.parameters(), mixed[1:], plain[1:], strict=True):
        assert a.dtype == parameter.dtype == torch.float32
        assert (a - b).norm() <= 0.15 * b.norm() + 2e-3


@pytest.mark.parametrize("style", STYLES)
def test_hidden_states_are_the_stream_before_each_layer_and_the_output(style):
    model: HBertModel = small_model(norm_style=style, layer_types="ASA")
    ids, mask = batch()
    out = model(ids, mask, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert all(not state[~mask].any() for state in out.hidden_states)
    streams = []
    for layer in model.layers:
        inputs = lambda _, args: streams.append(args[0] if args[1] is None else args[0] + args[1])  # noqa: E731
        layer.register_forward_pre_hook(inputs)
    model(ids, mask)
    for state, stream in zip(out.hidden_states[:-1], streams, strict=True):
        assert torch.equal(state[mask], stream)
    assert model(ids, mask).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids, mask).hidden_states) == 4
    assert len(model(ids, mask, return_dict=False)) == 2
