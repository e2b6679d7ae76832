"""State dicts of Fastformer and torchscale, against those encoders written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import HEADS, LENGTH, VOCAB, WIDTH, small_target

from hbert.convert import build, read_state_dict

LAYERS, INNER = 2, 20
EPS = 1e-5  # of torchscale


def random_state(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear_shapes(name, fan_in, fan_out):
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def norm_shapes(name, width=WIDTH):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x, eps=1e-12):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def fastformer_state():
    shapes = {"word_embedding.weight": (VOCAB, WIDTH)} | linear_shapes("dense_linear", WIDTH, 4)
    top = "fastformer_model."
    shapes |= {f"{top}position_embeddings.weight": (LENGTH, WIDTH)} | norm_shapes(f"{top}LayerNorm")
    for index in range(LAYERS):
        layer = f"{top}encoders.{index}."
        for name in ("query", "key", "transform"):
            shapes |= linear_shapes(f"{layer}attention.self.{name}", WIDTH, WIDTH)
        for name in ("query_att", "key_att"):
            shapes |= linear_shapes(f"{layer}attention.self.{name}", WIDTH, HEADS)
        shapes |= linear_shapes(f"{layer}attention.output.dense", WIDTH, WIDTH)
        shapes |= linear_shapes(f"{layer}intermediate.dense", WIDTH, INNER)
        shapes |= linear_shapes(f"{layer}output.dense", INNER, WIDTH)
        shapes |= norm_shapes(f"{layer}attention.output.LayerNorm") | norm_shapes(f"{layer}output.LayerNorm")
    shapes |= linear_shapes(f"{top}poolers.0.att_fc1", WIDTH, WIDTH)
    return random_state(shapes)


def pooled(scores, x):
    """The weighted sum of each head's slice of x [B, N, H] under softmax(scores [B, N, h]), as [B, 1, H]."""
    weights = (scores / math.sqrt(WIDTH // HEADS)).softmax(1)
    return torch.einsum("bnh,bnhd->bhd", weights, x.unflatten(-1, (HEADS, -1))).flatten(1).unsqueeze(1)


def fastformer(state, ids):
    top = "fastformer_model."
    x = state["word_embedding.weight"][ids] + state[f"{top}position_embeddings.weight"][: ids.shape[1]]
    x = norm(state, f"{top}LayerNorm", x)
    for index in range(LAYERS):
        layer = f"{top}encoders.{index}."
        own = f"{layer}attention.self."
        query, key = linear(state, f"{own}query", x), linear(state, f"{own}key", x)
        product = key * pooled(linear(state, f"{own}query_att", query), query)
        value = query * pooled(linear(state, f"{own}key_att", product), product)
        branch = linear(state, f"{own}transform", value) + query
        branch = linear(state, f"{layer}attention.output.dense", branch)
        x = norm(state, f"{layer}attention.output.LayerNorm", branch + x)
        inner = F.gelu(linear(state, f"{layer}intermediate.dense", x))
        x = norm(state, f"{layer}output.LayerNorm", linear(state, f"{layer}output.dense", inner) + x)
    return x


def torchscale_state(style):
    shapes = {"embed_tokens.weight": (VOCAB, WIDTH), "embed_positions.weight": (LENGTH + 2, WIDTH)}
    shapes |= norm_shapes("layernorm_embedding") | {"output_projection.weight": (VOCAB, WIDTH)}
    for index in range(LAYERS):
        layer = f"layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{layer}self_attn.{name}", WIDTH, WIDTH)
        shapes |= linear_shapes(f"{layer}ffn.fc1", WIDTH, INNER) | linear_shapes(f"{layer}ffn.fc2", INNER, WIDTH)
        shapes |= norm_shapes(f"{layer}self_attn_layer_norm") | norm_shapes(f"{layer}final_layer_norm")
        if style == "sub_ln":
            shapes |= norm_shapes(f"{layer}self_attn.inner_attn_ln")
            shapes |= norm_shapes(f"{layer}ffn.ffn_layernorm", INNER)
    return random_state(shapes | (norm_shapes("layer_norm") if style != "post_ln" else {}))


def torchscale(state, ids, style, scale):
    x = scale * state["embed_tokens.weight"][ids] + state["embed_positions.weight"][2 : 2 + ids.shape[1]]
    x = norm(state, "layernorm_embedding", x, EPS)
    for index in range(LAYERS):
        layer = f"layers.{index}."
        before, attention = style != "post_ln", f"{layer}self_attn."
        y = norm(state, f"{layer}self_attn_layer_norm", x, EPS) if before else x
        q, k, v = (heads_of(linear(state, f"{attention}{name}_proj", y)) for name in "qkv")
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = norm(state, f"{attention}inner_attn_ln", y, EPS) if style == "sub_ln" else y
        x = x + linear(state, f"{attention}out_proj", y)
        x = x if before else norm(state, f"{layer}self_attn_layer_norm", x, EPS)
        y = norm(state, f"{layer}final_layer_norm", x, EPS) if before else x
        y = F.gelu(linear(state, f"{layer}ffn.fc1", y))
        y = norm(state, f"{layer}ffn.ffn_layernorm", y, EPS) if style == "sub_ln" else y
        x = x + linear(state, f"{layer}ffn.fc2", y)
        x = x if before else norm(state, f"{layer}final_layer_norm", x, EPS)
    return norm(state, "layer_norm", x, EPS) if before else x


def target(letters, style, **fields):
    return small_target(
        layer_types=letters * LAYERS, num_hidden_layers=LAYERS, norm_style=style, type_vocab_size=0, **fields
    )


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def outputs(source, ids):
    model, report = build(source)
    with torch.no_grad():
        return model(ids).last_hidden_state, report


@pytest.mark.parametrize("style", ["sub_ln", "pre_ln", "post_ln"])
def test_torchscale(ids, style):
    state, scale = torchscale_state(style), math.sqrt(WIDTH)
    source = read_state_dict(state, target("S", style, layer_norm_eps=EPS), "torchscale", embedding_scale=scale)
    found, report = outputs(source, ids)
    assert (found - torchscale(state, ids, style, scale)).abs().max() < 1e-5
    assert not report.fresh and list(report.left_out) == ["output_projection.weight"]


def test_fastformer_where_its_output_projection_is_the_identity(ids):
    state = fastformer_state()
    for index in range(LAYERS):
        name = f"fastformer_model.encoders.{index}.attention.output.dense"
        state |= {f"{name}.weight": torch.eye(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}
    found, report = outputs(read_state_dict(state, target("A", "post_ln"), "fastformer"), ids)
    assert (found - fastformer(state, ids)).abs().max() < 1e-5
    assert not report.fresh
    left = report.left_out
    assert left[f"{name}.weight"] == "HBERT has no projection behind additive attention"
    assert left["dense_linear.bias"] == left["fastformer_model.poolers.0.att_fc1.bias"] == "a head of another task"
    assert len(left) == 2 * LAYERS + 4


@pytest.mark.parametrize(
    ("change", "config", "writer", "message"),
    [
        (lambda state: None, target("S", "sub_ln"), "fairseq", "unknown writer 'fairseq'; allowed: fastformer, torch"),
        (lambda state: None, target("A", "sub_ln"), "torchscale", "no tensor that could be layers.0.attention.query"),
        (
            lambda state: state.pop("layernorm_embedding.bias"),
            target("S", "sub_ln"),
            "torchscale",
            "tensor layernorm_embedding.bias is missing",
        ),
        (
            lambda state: state.update({"relative_position.relative_attention_bias.weight": torch.zeros(3)}),
            target("S", "sub_ln"),
            "torchscale",
            "such an encoder has not: relative_position",
        ),
        (lambda state: None, target("S", "pre_ln"), "torchscale", "has not: layers.0.self_attn.inner_attn_ln.weight"),
    ],
)
def test_what_does_not_fit(change, config, writer, message):
    state = torchscale_state("sub_ln")
    change(state)
    with pytest.raises(ValueError, match=message):
        read_state_dict(state, config, writer)
