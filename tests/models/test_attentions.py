"""output_attentions: the weights that are returned are those that the layers used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_helpers import batch, dense_twin, small_masked_lm, small_model

from hbert_kernels.packing import Packing

HEADS, HEAD_DIM = 3, 4
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def inputs_and_outputs(model, ids, mask):
    """(input, output) of each layer's attention, and the weights that the call returned."""
    seen, hooks = [], []
    for layer in model.layers:
        hooks.append(layer.attention.register_forward_hook(lambda _, args, out: seen.append((args[0], out))))
    weights = model(ids, mask, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return seen, weights


def heads_of(x):
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def inner_norm(module, x):
    norm = module.norm
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("norm_style", ["sub_ln", "post_ln"])
@pytest.mark.parametrize("scorer", ["dense", "per_head"])
def test_the_weights_reproduce_the_outputs(norm_style, scorer):
    model = small_model(layer_types="SA", norm_style=norm_style, scorer=scorer)
    ids, mask = batch()
    ((x, out), (y, gated)), (rows, pools) = inputs_and_outputs(model, ids, mask)
    module = model.layers[0].attention
    mixed = (rows @ heads_of(module.qkv(x).chunk(3, -1)[2])).transpose(1, 2).flatten(2)
    expected = module.out(inner_norm(module, mixed))
    torch.testing.assert_close(expected[mask], out[mask], **EXACT)
    module = model.layers[1].attention
    query, key = module.query(y), module.key(y)
    alpha, beta = pools[:, :, 0, None], pools[:, :, 1, None]
    global_query = (alpha @ heads_of(query)).flatten(1)[:, None]
    global_key = (beta @ heads_of(key * global_query)).flatten(1)[:, None]
    u = inner_norm(module, query * global_key)
    torch.testing.assert_close((module.transform(u) + query)[mask], gated[mask], **EXACT)


def test_shapes_and_sums():
    model = small_model(layer_types="ASA")
    ids, mask = batch()
    attentions = model(ids, mask, output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(4, HEADS, 2, 7), (4, HEADS, 7, 7), (4, HEADS, 2, 7)]
    for weights, rows in zip(attentions, (mask.any(1)[:, None], mask, mask.any(1)[:, None]), strict=True):
        assert not weights[~mask[:, None, None].expand_as(weights)].any()
        sums = rows[:, None].expand(weights.shape[:-1]).double()
        torch.testing.assert_close(weights.sum(-1), sums)


def test_asking_changes_the_output_by_rounding_only_and_the_default_is_not_to():
    model = small_model(dtype=torch.float32)
    ids, mask = batch()
    plain, asked = model(ids, mask), model(ids, mask, output_attentions=True)
    assert plain.attentions is None and dense_twin(model)(ids, mask).attentions is None
    torch.testing.assert_close(asked.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-5)
    eager = dense_twin(model)
    eager.config.output_attentions = True
    for a, b in zip(eager(ids, mask).attentions, asked.attentions, strict=True):
        assert torch.equal(a, b)


def test_masked_lm_returns_them_in_training_too():
    model = small_masked_lm(layer_types="AS").train()
    ids, mask = batch()
    out = model(ids, mask, labels=ids, output_attentions=True)
    assert len(out.attentions) == 2 and out.loss.requires_grad


def test_packed_inputs_have_none():
    ids, mask = batch()
    packing = Packing.from_mask(mask, static=False)
    with pytest.raises(ValueError, match="cu_seqlens cannot be combined with output_attentions=True"):
        small_model()(ids[mask], cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen, output_attentions=True)
