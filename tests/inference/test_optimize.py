"""optimize(): the copy computes what the original does, and takes what it takes."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import all_variants, batch, dense_twin, small_masked_lm, small_model, variant_name
from patch_helpers import small

import hbert.inference.linear
from hbert import (
    HBertForQuestionAnswering,
    HBertForSequenceClassification,
    HBertForTokenClassification,
    HBertModel,
    optimize,
)
from hbert.inference.kernels import CompiledKernels, Kernels
from hbert.inference.linear import KernelLinear, TorchLinear, own_product_is_faster, pack, row_count
from hbert_kernels import use_backend
from hbert_kernels.packing import Packing

FP32 = {"rtol": 1e-4, "atol": 1e-5}
HYBRID = {"layer_types": "AAS", "conv_kernel_size": 3}
# Short sequences take additive attention in its direct form, long ones K-free.
SHORT, LONG = batch(), batch(rows=2, length=45)


@pytest.mark.parametrize("inputs", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("fields", all_variants(), ids=variant_name)
def test_every_variant_in_float32(fields, inputs):
    model = small_model(dtype=torch.float32, **fields)
    ids, mask = inputs
    expected = model(ids, mask, output_hidden_states=True)
    found = optimize(model)(ids, mask, output_hidden_states=True)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, **FP32)
    assert torch.equal(found.last_hidden_state, found.hidden_states[-1])


@pytest.mark.parametrize("inputs", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("fields", all_variants(), ids=variant_name)
def test_bfloat16_is_as_good_as_the_original_in_bfloat16(fields, inputs):
    model = small_model(dtype=torch.float64, **fields)
    ids, mask = inputs
    exact = model(ids, mask).last_hidden_state
    fast = optimize(model.float(), "bf16")(ids, mask).last_hidden_state
    plain = dense_twin(model.to(torch.bfloat16))(ids, mask).last_hidden_state
    assert fast.dtype == torch.bfloat16
    error, allowed = ((t.double() - exact).norm() for t in (fast, plain))
    assert error <= 1.5 * allowed


@pytest.mark.parametrize(
    "kind", [HBertForSequenceClassification, HBertForTokenClassification, HBertForQuestionAnswering]
)
def test_heads(kind):
    model = small_model(kind, dtype=torch.float32, **HYBRID)
    ids, mask = batch()
    fast = optimize(model)
    assert type(fast) is kind
    for a, b in zip(fast(ids, mask).to_tuple(), model(ids, mask).to_tuple(), strict=True):
        torch.testing.assert_close(a, b, **FP32)
    assert {p.dtype for p in optimize(model, "bf16").parameters()} == {torch.bfloat16}


def test_masked_lm_and_packed_inputs():
    model = small_masked_lm(dtype=torch.float32, **HYBRID)
    ids, mask = batch()
    packing = Packing.from_mask(mask, static=False)
    fast = optimize(model)
    expected = model(ids, mask, labels=ids)
    found = fast(ids, mask, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, **FP32)
    torch.testing.assert_close(found.loss, expected.loss)
    packed = fast(ids[mask], cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen)
    torch.testing.assert_close(packed.logits, expected.logits[mask], **FP32)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("kind", [HBertModel, HBertForTokenClassification])
def test_a_model_that_runs_eager(kind, dtype):
    model = small_model(kind, dtype=torch.float32, **HYBRID)
    eager = dense_twin(model)
    assert torch.equal(optimize(eager, dtype)(*SHORT)[0], optimize(model, dtype)(*SHORT)[0])
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "build", [lambda: dense_twin(small_model()), lambda: small("bert", attn_implementation="eager")]
)
def test_a_configuration_that_asks_for_attentions_is_refused(build):
    model = build().float()
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="asks for attentions, .*; set config.output_attentions = False"):
        optimize(model)
    model.config.output_attentions = False
    optimize(model)


def test_autocast_around_a_call_changes_nothing():
    fast = optimize(small_model(dtype=torch.float32, **HYBRID))
    expected = fast(*LONG).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(*LONG).last_hidden_state, expected)


def test_moving_to_where_it_is_already_changes_nothing():
    fast = optimize(small_model(HBertForSequenceClassification, dtype=torch.float32))
    expected = fast(*SHORT).logits
    assert torch.equal(fast.to("cpu").float().eval()(*SHORT).logits, expected)


def test_the_copy_is_on_its_own():
    model = small_model(HBertForSequenceClassification, dtype=torch.float32, **HYBRID).train()
    before = copy.deepcopy(model.state_dict())
    ids, mask = batch()
    fast = optimize(model)
    expected = fast(ids, mask).logits
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(fast(ids, mask).logits, expected) and not expected.requires_grad


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_reference_path(dtype):
    fast = optimize(small_model(dtype=torch.float32, **HYBRID), dtype)
    expected = fast(*LONG).last_hidden_state
    with use_backend("reference"):
        found = fast(*LONG).last_hidden_state
    if dtype == "fp32":
        return torch.testing.assert_close(found, expected, **FP32)
    # A number at the border of two int8 values may go to the other one: a few steps of 1/127 at most.
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_without_the_ops_of_onednn(monkeypatch):
    model = small_model(dtype=torch.float32, **HYBRID)
    ids, mask = batch()
    monkeypatch.setattr(hbert.inference.linear, "cpu_capability", lambda: "none")
    for can_pack in (True, False):
        monkeypatch.setattr(hbert.inference.linear, "_can_pack", lambda device, dtype, can=can_pack: can)
        fast = optimize(model)
        torch.testing.assert_close(fast(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state, **FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37, 128, 129, 300])
def test_linear_layers_are_packed_and_add(dtype, rows):
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 40), torch.randn(24)
    x, other = torch.randn(rows, 40).to(dtype), torch.randn(rows, 24).to(dtype)
    linears = [TorchLinear(weight, bias, dtype), KernelLinear(weight, bias, dtype)]
    assert linears[0].is_packed == (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    exact = x.double() @ weight.to(dtype).double().T + bias.to(dtype).double()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    kept = other.clone()
    for linear in linears:
        for kernels in (Kernels(), CompiledKernels()):
            torch.testing.assert_close(linear(kernels, x).double(), exact, **tolerance)
            torch.testing.assert_close(linear(kernels, x, other).double(), exact + other.double(), **tolerance)
            gelu = torch.nn.functional.gelu(exact)
            torch.testing.assert_close(linear.activated(kernels, x, "gelu").double(), gelu, **tolerance)
            assert torch.equal(other, kept)


def test_our_product_runs_where_it_was_measured(monkeypatch):
    weight = torch.randn(24, 40)
    for level, own in {"none": False, "scalar": False, "neon_dot": False, "avx2": True, "avx512_amx": True}.items():
        monkeypatch.setattr(hbert.inference.linear, "cpu_capability", lambda level=level: level)
        assert own_product_is_faster() == own
        for dtype in (torch.float32, torch.bfloat16):
            assert type(pack(weight, None, dtype)) is (KernelLinear if own else TorchLinear)


def test_numbers_of_rows_are_few_and_near():
    rows = range(8193)
    taken = [row_count(n) for n in rows]
    assert all(n <= t <= n + n // 16 for n, t in zip(rows, taken, strict=True))
    assert len(set(taken)) < 170 and taken[:33] == [*range(33)]


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("style", ["sub_ln", "post_ln"])
def test_rows_behind_the_last_token_are_not_seen(style, dtype, monkeypatch):
    monkeypatch.setattr(hbert.inference.linear, "cpu_capability", lambda: "none")  # oneDNN's products, so dead rows
    model = small_model(dtype=torch.float32, layer_types="AS", norm_style=style)
    ids = batch(rows=5, length=35)[0]
    assert row_count(ids.numel()) > ids.numel()
    found = optimize(model, dtype)(ids, output_hidden_states=True)
    for a, b in zip(found.hidden_states, model(ids, output_hidden_states=True).hidden_states, strict=True):
        assert a.shape == b.shape and (a - b).norm() < (0.1 if dtype == "int8" else 1e-5) * b.norm()


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_calls_from_several_threads(dtype):
    fast = optimize(small_model(dtype=torch.float32, **HYBRID), dtype)
    batches = [batch(rows=3, length=5 + n, seed=n) for n in range(8)]
    expected = [fast(*inputs).last_hidden_state for inputs in batches]
    wrong = []

    def work(n: int) -> None:
        for _ in range(20):
            if not torch.equal(fast(*batches[n]).last_hidden_state, expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_memory_does_not_grow_with_calls_of_random_shapes(dtype):
    fast = optimize(small_model(dtype=torch.float32, layer_types="AS", max_position_embeddings=48), dtype)
    sizes = np.random.default_rng(0).integers(1, 12, (2500, 2))

    def run(chosen) -> int:
        for rows, length in chosen.tolist():
            fast(torch.ones(rows, length, dtype=torch.int64))
        # Not the largest so far, which an earlier test may have set.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])

    # oneDNN keeps code for each number of rows: all have been seen after these.
    warm = run(sizes[:1000])
    # KiB; one activation that stays, in each call, would be 2,600.
    assert run(sizes[1000:]) - warm < 1024


class Adapter(torch.nn.Linear):
    """A linear layer of somebody else."""


def derived():
    model = small_model()
    model.layers[1].ffn.fc1 = Adapter(12, 20)
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optimize(7), TypeError, "takes a torch.nn.Module or the path of a folder, got int"),
        (
            lambda: optimize(small("bert", hidden_act="silu")),
            ValueError,
            "BertModel cannot be optimized: its activation is 'silu'; HBERT has gelu",
        ),
        (lambda: optimize(torch.nn.Linear(2, 2)), ValueError, "Linear cannot be optimized: it holds none of HB"),
        (lambda: optimize(small_model(), "fp16"), ValueError, "dtype is 'fp16'; allowed: 'fp32', 'bf16', 'int8'"),
        (lambda: optimize(small_model()).train(), ValueError, "cannot be trained"),
        (lambda: optimize(small_model()).double(), ValueError, "stays torch.float32 on cpu: move or convert"),
        (lambda: optimize(small_model()).to("meta"), ValueError, "stays torch.float32 on cpu: move or convert"),
        (lambda: copy.deepcopy(optimize(small_model())), TypeError, "cannot be copied or pickled"),
        (lambda: optimize(small_model().to("meta"), "int8"), ValueError, "int8 runs on CPUs, and the model is on"),
        (lambda: optimize(derived()), ValueError, "its layers.1.ffn.fc1 is a Adapter of test_optimize, .*; merge"),
        (
            lambda: optimize(small_model(dtype=torch.float32))(*batch(), output_attentions=True),
            ValueError,
            "runs packed: no output_attentions",
        ),
        (
            lambda: optimize(small("bert").float())(torch.ones(1, 3, dtype=torch.int64), output_attentions=True),
            ValueError,
            "an optimized model has no output_attentions",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


LEVELS = """
import sys, torch, hbert, hbert_kernels
level = sys.argv[1]
assert hbert_kernels.cpu_capability() == level
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
torch.manual_seed(0)
config = hbert.HBertConfig(
    vocab_size=61, hidden_size=48, num_attention_heads=3, intermediate_size=80, layer_types="AS", conv_kernel_size=3
)
model = hbert.HBertModel(config).eval()
ids = torch.randint(61, (2, 30))
expected = model(ids).last_hidden_state.detach()
for dtype, allowed in (("fp32", 1e-5), ("int8", 0.05)):
    error = hbert.optimize(model, dtype)(ids).last_hidden_state - expected
    assert error.norm() < allowed * expected.norm(), (dtype, error.norm() / expected.norm())
"""


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_narrower_instruction_sets(level):
    caps = {"HBERT_CPU_CAPABILITY": level, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    ran = subprocess.run([sys.executable, "-c", LEVELS, level], env=os.environ | caps, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
