"""optimize(model, "int8"): as near to the original as int8 numbers are, by an emulation in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from convert_helpers import FAMILIES
from model_helpers import all_variants, batch, dense_twin, small_masked_lm, small_model, variant_name
from patch_helpers import batch_of, small
from torch import nn

from hbert import HBertForSequenceClassification, optimize
from hbert.inference.smoothing import input_magnitudes, smoothing_scale
from hbert_kernels import pack_int8_weight
from hbert_kernels.ops.int8_linear import unpack_int8_weight

SHORT, LONG = batch(), batch(rows=2, length=45)
SCORERS = ("query_att", "key_att")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row as int8 numbers with one scale."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round() * scale


def quantize(model: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """Rounds what the linear layers of a model read, their weights and the token embedding: no folding, no smoothing,
    no fused norm."""
    words = model.get_input_embeddings()
    words.weight.data = rounded(words.weight.data)
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] not in SCORERS:
            packed = pack_int8_weight(module.weight.data.float())
            module.weight.data = unpack_int8_weight(packed).double() * packed.scale[:, None]
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]), *inputs[1:]))
    return model


def errors(model, fast, emulated, inputs):
    """Distances to ``model`` in float64: of the optimized model and of the emulation."""
    exact = model(**inputs).last_hidden_state
    where = exact != 0  # encoders of transformers compute states under the mask, too
    if (mask := inputs.get("attention_mask")) is not None:
        where &= mask[..., None] != 0
    return [((other(**inputs).last_hidden_state.double() - exact)[where]).norm() for other in (fast, emulated)]


@pytest.mark.parametrize("inputs", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("fields", all_variants(), ids=variant_name)
def test_every_variant_is_as_good_as_an_emulation(fields, inputs):
    model = small_model(dtype=torch.float64, hidden_size=48, intermediate_size=80, **fields)
    fast = optimize(model, "int8")
    emulated = dense_twin(model)
    named = dict(zip(("input_ids", "attention_mask"), inputs, strict=True))
    error, allowed = errors(model, fast, quantize(emulated, emulated.layers), named)
    assert 0 < error <= 1.5 * allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_of_transformers(family):
    model = small(family).double()
    inputs = batch_of(model)
    emulated = copy.deepcopy(model)
    layers = (emulated.transformer if family == "distilbert" else emulated.encoder).layer
    error, allowed = errors(model, optimize(model, "int8"), quantize(emulated, layers), inputs)
    assert 0 < error <= 1.5 * allowed


@pytest.mark.parametrize("style", ["sub_ln", "pre_ln", "post_ln"])
def test_large_channels_do_not_take_the_resolution_of_the_others(style):
    model = small_model(dtype=torch.float64, norm_style=style, layer_types="SS", hidden_size=48, intermediate_size=80)
    with torch.no_grad():
        for norm in (model.embeddings.norm, *(n for la in model.layers for n in (la.attention_norm, la.ffn_norm))):
            norm.weight[7] *= 50
        for linear in (part for layer in model.layers for part in (layer.attention.qkv, layer.ffn.fc1)):
            linear.weight[:, 7] /= 50
    named = dict(zip(("input_ids", "attention_mask"), SHORT, strict=True))
    emulated = dense_twin(model)
    error, without_smoothing = errors(model, optimize(model, "int8"), quantize(emulated, emulated.layers), named)
    assert error <= 0.5 * without_smoothing


def test_magnitudes_are_those_of_what_the_layers_read():
    model = small_model(dtype=torch.float32, layer_types="AS", norm_style="pre_ln")
    found = input_magnitudes(model)
    assert found.keys() == {
        f"{layer}.{name}"
        for layer, attention in enumerate((("query", "key", "query_att", "key_att", "transform"), ("qkv", "out")))
        for name in (*(f"attention.{part}" for part in attention), "ffn.fc1", "ffn.fc2")
    } - {"0.attention.query_att", "0.attention.key_att", "0.attention.key"}
    assert found["1.ffn.fc2"].shape == (20,) and all(bool((value > 0).all()) for value in found.values())
    # LN(x) o w + b with |LN(x)| <= sqrt(H)
    norm = model.layers[0].ffn_norm
    assert bool((found["0.ffn.fc1"] <= 12**0.5 * norm.weight.abs() + norm.bias.abs()).all())


def test_smoothing_evens_out_rows_and_weights():
    magnitude, weights = torch.tensor([1.0, 100.0, 0.0]), [torch.tensor([[0.5, -1.0, 0.0], [0.25, 0.5, 0.0]])]
    scale = smoothing_scale(magnitude, weights)
    torch.testing.assert_close(scale, torch.tensor([2**0.5, 10.0, 1.0]))
    torch.testing.assert_close(magnitude / scale, weights[0].abs().amax(0) * scale)


def test_the_embedding_of_tokens_is_rounded_row_by_row():
    model = small_model(dtype=torch.float32, hidden_size=48, intermediate_size=80)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(torch.logspace(-2, 2, model.config.vocab_size)[:, None])
    fast, ids = optimize(model, "int8"), SHORT[0]
    words, original = fast.get_input_embeddings(), model.get_input_embeddings()
    assert (words.num_embeddings, words.embedding_dim) == (original.num_embeddings, original.embedding_dim)
    assert words(ids).dtype == torch.float32 and words(ids).shape == (*ids.shape, 48)
    torch.testing.assert_close(words(ids), rounded(original.weight)[ids])
    assert max(buffer.nbytes for buffer in words.buffers()) == original.weight.nbytes / 4
    by_ids = fast(ids, SHORT[1]).last_hidden_state
    assert torch.equal(fast(inputs_embeds=words(ids), attention_mask=SHORT[1]).last_hidden_state, by_ids)


def test_what_is_around_the_encoder_stays_in_float32():
    model = small_model(HBertForSequenceClassification, dtype=torch.float32)
    fast = optimize(model, "int8")
    assert {p.dtype for p in fast.parameters()} == {torch.float32}
    assert fast(*SHORT).logits.dtype == torch.float32
    words = small_masked_lm(dtype=torch.float32)
    assert torch.equal(optimize(words, "int8").head.decoder.weight, words.head.decoder.weight)


def test_the_original_stays_as_it_is():
    model = small_model(dtype=torch.float32, layer_types="AS").train()
    expected = copy.deepcopy(model.state_dict())
    optimize(model, "int8")
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.values(), strict=True))


def test_weights_that_are_not_finite_are_refused():
    model = small_model(dtype=torch.float32)
    with torch.no_grad():
        model.layers[1].ffn.fc2.weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        optimize(model, "int8")
