"""The encoder against formulas written out in NumPy, and against torch's own encoder layer."""

from __future__ import annotations

import pytest
import torch
from model_helpers import VOCAB, NumpyEncoder, all_variants, dense_twin, small_model, variant_name
from torch import nn


@pytest.mark.parametrize("fields", all_variants(), ids=variant_name)
def test_every_variant_equals_the_formulas(fields):
    model = small_model(**fields)
    dense, reference = dense_twin(model), NumpyEncoder(model)
    for length in (1, 7, 37):
        ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
        expected = torch.from_numpy(reference(ids[0].numpy()))
        torch.testing.assert_close(model(ids).last_hidden_state[0], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dense(ids).last_hidden_state[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("style", ["sub_ln", "post_ln"])
def test_every_activation_equals_the_formulas(style, activation):
    model = small_model(norm_style=style, hidden_act=activation)
    ids = torch.arange(1, 12).unsqueeze(0)
    expected = torch.from_numpy(NumpyEncoder(model)(ids[0].numpy()))
    torch.testing.assert_close(model(ids).last_hidden_state[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", ["pre_ln", "post_ln"])
def test_self_attention_layers_equal_torchs_encoder_layer(style):
    model = small_model(norm_style=style, layer_types="S")
    ours = model.layers[0]
    config = model.config
    theirs = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=style == "pre_ln",
        dtype=torch.float64,
    )
    pairs = {
        "self_attn.in_proj_": ours.attention.qkv,
        "self_attn.out_proj.": ours.attention.out,
        "linear1.": ours.ffn.fc1,
        "linear2.": ours.ffn.fc2,
        "norm1.": ours.attention_norm,
        "norm2.": ours.ffn_norm,
    }
    theirs.load_state_dict({f"{k}{p}": getattr(m, p) for k, m in pairs.items() for p in ("weight", "bias")})
    ids = torch.randint(0, VOCAB, (3, 7))
    states = model(ids, output_hidden_states=True).hidden_states
    expected = theirs(states[0])
    if model.norm is not None:
        expected = nn.functional.layer_norm(expected, (12,), model.norm.weight, model.norm.bias, model.norm.eps)
    torch.testing.assert_close(states[1], expected, rtol=1e-10, atol=1e-10)


def test_learned_positions_and_token_types_are_added():
    model = small_model(positions="learned", type_vocab_size=2, layer_types="A")
    ids, types = torch.randint(0, VOCAB, (2, 7)), torch.randint(0, 2, (2, 7))
    tables = model.embeddings
    total = tables.word_embeddings.weight[ids] + tables.position_embeddings.weight[:7]
    total = total + tables.token_type_embeddings.weight[types]
    norm = tables.norm
    expected = nn.functional.layer_norm(total, (12,), norm.weight, norm.bias, norm.eps)
    got = model(ids, token_type_ids=types, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    zeros = model(ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state
    assert torch.equal(model(ids).last_hidden_state, zeros)


def test_position_ids_replace_the_ranks():
    model = small_model()
    ids = torch.randint(0, VOCAB, (1, 5))
    shifted = model(ids, position_ids=torch.arange(3, 8).unsqueeze(0)).last_hidden_state
    longer = model(torch.cat([ids[:, :3], ids], 1), output_hidden_states=True).hidden_states[0][:, 3:]
    states = model(ids, position_ids=torch.arange(3, 8).unsqueeze(0), output_hidden_states=True).hidden_states
    assert torch.equal(states[0], longer)
    assert not torch.allclose(shifted, model(ids).last_hidden_state)
