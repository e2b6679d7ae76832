"""Packed, static and dense layouts are one model; padding does not exist."""

from __future__ import annotations

import pytest
import torch
from model_helpers import VOCAB, all_variants, batch, dense_twin, run_static, small_model, variant_name

from hbert import HBertModel, PackedLayout
from hbert_kernels.packing import Packing


def run_packed(model, ids, mask):
    return model(ids, mask).last_hidden_state


LAYOUTS = {
    "packed": run_packed,
    "static": run_static,
    "dense": lambda model, ids, mask: run_packed(dense_twin(model), ids, mask),
}
each_layout = pytest.mark.parametrize("run", LAYOUTS.values(), ids=LAYOUTS)


@pytest.mark.parametrize("fields", all_variants(), ids=variant_name)
def test_layouts_agree_in_float64(fields):
    model = small_model(**fields)
    dense = dense_twin(model)
    for length in (1, 7, 37):
        ids, mask = batch(length=length)
        expected = run_packed(dense, ids, mask)
        torch.testing.assert_close(run_packed(model, ids, mask), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(run_static(model, ids, mask), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", all_variants()[::3], ids=variant_name)
def test_layouts_agree_to_rounding(fields, dtype):
    """Error against float64 at most twice that of plain torch (the dense layout) at the same dtype."""
    model = small_model(**fields, dtype=dtype)
    exact = dense_twin(model).double()
    ids, mask = batch(rows=5, length=37)
    expected = run_packed(exact, ids, mask)
    plain = (run_packed(dense_twin(model), ids, mask) - expected).abs().max()
    allowed = 2 * plain + 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert (run_packed(model, ids, mask) - expected).abs().max() <= allowed
    assert (run_static(model, ids, mask) - expected).abs().max() <= allowed


@pytest.mark.parametrize("fields", all_variants(), ids=variant_name)
def test_gradients_agree_in_float64(fields):
    model = small_model(**fields)
    ids, mask = batch(length=7)
    weight = torch.randn(4, 7, 12, dtype=torch.float64)

    def gradients(output, of):
        parameters = dict(of.named_parameters())
        grads = torch.autograd.grad((output * weight).sum(), list(parameters.values()))
        return dict(zip(parameters, grads, strict=True))

    dense = dense_twin(model)
    expected = gradients(run_packed(dense, ids, mask), dense)
    assert all(g.abs().max() > 0 for name, g in expected.items() if not name.endswith("_att.bias"))
    for run in (run_packed, run_static):
        got = gradients(run(model, ids, mask), model)
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@each_layout
def test_left_and_right_padding_give_the_same_tokens(run):
    model = small_model(layer_types="AAS", conv_kernel_size=3)
    lengths = (7, 3, 1)
    ids = torch.randint(0, VOCAB, (3, 7))
    right, left = torch.zeros_like(ids), torch.zeros_like(ids)
    right_mask, left_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        right[row, :n] = left[row, 7 - n :] = ids[row, :n]
        right_mask[row, :n] = left_mask[row, 7 - n :] = 1
    a, b = run(model, right, right_mask.bool()), run(model, left, left_mask.bool())
    for row, n in enumerate(lengths):
        if run is LAYOUTS["dense"]:  # GEMMs over another token order: equal to rounding
            torch.testing.assert_close(a[row, :n], b[row, 7 - n :], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(a[row, :n], b[row, 7 - n :])
    assert not a[~right_mask.bool()].any() and not b[~left_mask.bool()].any()


@each_layout
def test_holes_are_not_there(run):
    model = small_model(layer_types="AAS", conv_kernel_size=5)
    ids, mask = batch(rows=6, length=37)
    out = run(model, ids, mask)
    for row in (0, 2, 3, 4, 5):
        alone = ids[row, mask[row]].unsqueeze(0)
        expected = run(model, alone, torch.ones_like(alone, dtype=torch.bool))[0]
        torch.testing.assert_close(out[row, mask[row]], expected, rtol=1e-12, atol=1e-12)


@each_layout
@pytest.mark.parametrize("style", ["sub_ln", "merge"])
def test_what_stands_under_the_mask_changes_no_bit(run, style):
    conv = 3 if style == "sub_ln" else 0
    model = small_model(norm_style=style, layer_types="AAS", conv_kernel_size=conv, dtype=torch.float32)
    ids, mask = batch(rows=5, length=37)
    clean = run(model, ids, mask)
    for garbage in (7, -5, 10**9):
        assert torch.equal(run(model, torch.where(mask, ids, garbage), mask), clean)
    assert not clean[~mask].any() and clean.isfinite().all()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_embeddings_under_the_mask_reach_neither_outputs_nor_gradients(dense, garbage):
    model = small_model(layer_types="AAS", conv_kernel_size=3)
    model = dense_twin(model) if dense else model
    _, mask = batch(rows=5, length=7)
    embeds = torch.randn(5, 7, 12, dtype=torch.float64)

    def outputs(x):
        x = x.clone().requires_grad_()
        out = model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        grads = torch.autograd.grad(out.square().sum(), [x, *model.layers.parameters()])
        return [out, *grads]

    clean = outputs(embeds)
    dirty = outputs(embeds.masked_fill(~mask[..., None], garbage))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[1][~mask].any()


def test_garbage_in_dead_rows_of_the_static_layout_reaches_no_gradient():
    model = small_model()
    _, mask = batch(rows=3, length=7)
    embeds = torch.randn(3, 7, 12, dtype=torch.float64).masked_fill(~mask[..., None], float("nan"))
    layout = PackedLayout(Packing.from_mask(mask, static=True))
    out = layout.unpack(model(inputs_embeds=layout.pack(embeds), layout=layout).last_hidden_state)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.layers.parameters())


@each_layout
def test_rows_of_only_padding_and_batches_of_only_padding_are_zero(run):
    model = small_model()
    ids, mask = batch(rows=4, length=7)
    assert torch.equal(run(model, ids, mask)[1], torch.zeros(7, 12, dtype=torch.float64))
    assert not run(model, ids, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(0, 7), (2, 0), (0, 0)])
def test_empty_batches(shape, dense):
    model = small_model(layer_types="AAS", conv_kernel_size=3)
    model = dense_twin(model) if dense else model
    ids = torch.zeros(shape, dtype=torch.int64)
    assert model(ids, torch.ones_like(ids)).last_hidden_state.shape == (*shape, 12)
    assert model(ids).last_hidden_state.shape == (*shape, 12)


def test_a_batch_equals_its_rows_one_by_one():
    model = small_model(layer_types="AAS", conv_kernel_size=3)
    ids, mask = batch(rows=5, length=37)
    out = model(ids, mask).last_hidden_state
    for row in range(5):
        one = model(ids[row : row + 1], mask[row : row + 1]).last_hidden_state[0]
        torch.testing.assert_close(out[row], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_masks_may_be_bool_or_integer(dtype):
    model = small_model()
    ids, mask = batch()
    assert torch.equal(model(ids, mask.to(dtype)).last_hidden_state, model(ids, mask).last_hidden_state)
    full = torch.ones_like(mask)
    assert torch.equal(model(ids, full.to(dtype)).last_hidden_state, model(ids).last_hidden_state)


def test_packed_inputs_equal_the_padded_batch():
    model = small_model(layer_types="AAS", conv_kernel_size=3, type_vocab_size=2)
    ids, mask = batch(rows=5, length=7)
    types = torch.randint(0, 2, ids.shape)
    padded = model(ids, mask, token_type_ids=types, output_hidden_states=True)
    lengths = mask.sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed = model(
        ids[mask], token_type_ids=types[mask], cu_seqlens=cu, max_seqlen=int(lengths.max()), output_hidden_states=True
    )
    assert torch.equal(packed.last_hidden_state, padded.last_hidden_state[mask])
    for a, b in zip(packed.hidden_states, padded.hidden_states, strict=True):
        assert torch.equal(a, b[mask])


def test_dead_rows_behind_packed_inputs_are_zero_and_change_nothing():
    model = small_model(layer_types="AAS", conv_kernel_size=3)
    ids, cu = torch.randint(0, VOCAB, (9,)), torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    expected = model(ids, cu_seqlens=cu, max_seqlen=7).last_hidden_state
    longer = torch.cat([ids, torch.tensor([-1, 10**9, 3])])
    out = model(longer, cu_seqlens=cu, max_seqlen=7).last_hidden_state
    torch.testing.assert_close(out[:9], expected, rtol=1e-12, atol=1e-12)
    assert not out[9:].any()


def test_a_head_can_work_on_packed_tokens():
    model: HBertModel = small_model()
    ids, mask = batch()
    layout, tokens = model.pack_inputs(ids, mask)
    assert tokens["input_ids"].shape == (int(mask.sum()),)
    out = model(**tokens, layout=layout).last_hidden_state
    assert torch.equal(out, model(ids, mask).last_hidden_state[mask])
    assert torch.equal(layout.unpack(out), model(ids, mask).last_hidden_state)
