"""The problems of the kernels suite: all peers compute the same function, at the declared cost."""

import pytest
import torch

import hbert_kernels
from bench.device import Cpu
from bench.floor import Stream, stream
from bench.gate import Checker, in_packed
from bench.ops import GEMM, HIDDEN, NAMES, STREAM, Setting, load
from bench.ops.attention import lengths
from bench.ops.problem import Draw
from hbert_kernels._accuracy import evaluate

VARIANTS = [(name, variant) for name in NAMES for variant in load(name).variants]


def setting(name, variant, dtype="fp32"):
    return Setting(variant, 2, 7, load(name).steps[-1], dtype)


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_all_peers_compute_the_same_function_and_gradients(name, variant, monkeypatch):
    monkeypatch.setattr("bench.ops.masked_lm_loss._VOCAB", 101)
    problem = load(name).problem(setting(name, variant))
    inputs = [value.double() for value in problem.inputs]
    with hbert_kernels.use_backend("reference"):
        first, *others = [
            evaluate(in_packed(function, problem.layouts.get(peer)), inputs)
            for peer, function in {**problem.candidates, **problem.baselines}.items()
        ]
    assert others and any(value.abs().max() > 1e-3 for value in first.values())
    for other in others:
        for value, expected in zip(other.values(), first.values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_int8_layer_of_onednn_gets_unsigned_rows(dtype):
    problem = load("int8_linear").problem(setting("int8_linear", "square", dtype))
    rows, *parameters = problem.inputs
    unsigned = problem.layouts["onednn"].from_packed(rows)
    assert torch.equal(unsigned.to(torch.uint8).float() - 128, rows.float()) and unsigned.dtype == rows.dtype
    plain, found = (problem.baselines[name](x, *parameters) for name, x in (("eager", rows), ("onednn", unsigned)))
    torch.testing.assert_close(found, plain, rtol=1.6e-2, atol=1e-3)


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_the_declared_peers_are_those_of_the_problem(name, variant):
    op = load(name)
    problem = op.problem(setting(name, variant))
    assert tuple(problem.candidates) == op.candidates(variant)
    assert [peer for peer in op.baselines if peer != "compile"] == list(problem.baselines)


def test_inputs_are_the_same_each_time():
    drawn = [Draw(Setting("", 1, 5, "fwd", "bf16")).rows() for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].dtype == torch.bfloat16 and drawn[0].shape == (5, HIDDEN)


@pytest.mark.parametrize(
    "name, variant, step, dtype, reads, writes",
    [
        ("layer_norm", "plain", "fwd", "fp32", 14 * 768 * 4, 14 * 768 * 4),
        ("layer_norm", "residual", "bwd", "bf16", 3 * 14 * 768 * 2, 14 * 768 * 2),
        ("activation_layer_norm", "", "bwd", "bf16", 2 * 14 * 3072 * 2, 14 * 3072 * 2),
        ("additive_pool", "dense", "fwd", "fp32", 14 * 768 * 4, 0),
        ("additive_attention", "core-dense", "fwd", "bf16", 2 * 14 * 768 * 2, 14 * 768 * 2),
        ("additive_attention", "dense", "fwd", "bf16", 2 * 14 * 768 * 2 + 768 * 768 * 2, 14 * 768 * 2),
    ],
)
def test_streamed_bytes_by_hand(name, variant, step, dtype, reads, writes):
    cost = load(name).cost(Setting(variant, 2, 7, step, dtype))
    assert (cost.floor, cost.reads, cost.writes, cost.work) == (STREAM, reads, writes, reads + writes)


@pytest.mark.parametrize(
    "name, variant, step, operations",
    [
        ("layer_norm", "plain", "fwd", 8 * 260 * 768),
        ("layer_norm", "residual", "bwd", 17 * 260 * 768),
        ("activation_layer_norm", "", "bwd", (19 + 31 + 20) * 260 * 3072),
        ("gated_layer_norm", "", "bwd", 20 * 260 * 768),
        # Chunks of 64, 64 and 2 rows: two rows are normalized twice at each of two borders, in both sequences.
        ("conv_layer_norm", "", "fwd", (14 * 260 + 8 * 8) * 768),
        ("conv_layer_norm", "", "bwd", 32 * 260 * 768),
        ("additive_pool", "dense", "fwd", 2 * 260 * 12 * 768 + 23 * 260 * 12 + 2 * 260 * 768),
        ("additive_pool", "per-head", "bwd", 6 * 260 * 12 * 64 + 26 * 260 * 12 + 4 * 260 * 768),
        ("additive_attention", "core-dense", "fwd", 4 * 260 * 12 * 768 + 46 * 260 * 12 + 13 * 260 * 768),
        ("additive_attention", "core-per-head", "bwd", 12 * 260 * 12 * 64 + 52 * 260 * 12 + 28 * 260 * 768),
        ("additive_attention", "dense", "fwd", None),
        ("attention", "full", "fwd", 4 * 33800 * 768 + 23 * 33800 * 12 + 260 * 768),
        ("attention", "full", "bwd", 10 * 33800 * 768 + 24 * 33800 * 12 + 5 * 260 * 768),
        ("masked_lm_loss", "", "full", 6 * 39 * 768 * 30522 + 26 * 39 * 30522),
        ("packed_linear", "down", "fwd", 2 * 260 * 3072 * 768),
        ("int8_linear", "up", "fwd", 2 * 260 * 768 * 3072 + 4 * 260 * 768),
    ],
)
def test_operations_by_hand(name, variant, step, operations):
    """Two sequences of 130 tokens, 33,800 pairs of them, 39 masked ones; an exponential is 20."""
    assert load(name).cost(Setting(variant, 2, 130, step, "bf16")).operations == operations


@pytest.mark.parametrize("step, products", [("fwd", 2), ("bwd", 5)])
def test_the_floor_of_attention_has_as_many_operations(step, products):
    cost = load("attention").cost(Setting("full", 8, 128, step, "bf16"))
    assert cost.floor == GEMM and cost.work == 8 * 12 * products * 2 * 128 * 128 * 64
    varlen = Setting("varlen", 8, 512, step, "bf16")
    wanted = 12 * products * 2 * 64 * sum(n * n for n in lengths(varlen))
    assert load("attention").cost(varlen).work == pytest.approx(wanted, rel=0.01)


def test_variable_lengths_fill_two_fifths_and_reach_the_longest():
    drawn = lengths(Setting("varlen", 8, 512, "fwd", "bf16"))
    assert len(drawn) == 8 and max(drawn) == 512 and min(drawn) >= 1
    assert sum(drawn) == pytest.approx(0.4 * 4096, rel=0.01)


def test_the_loss_has_the_rows_of_15_percent_masked():
    cost = load("masked_lm_loss").cost(Setting("", 8, 512, "full", "bf16"))
    assert cost.work == 3 * 2 * 614 * 768 * 30522


@pytest.mark.parametrize("reads, writes", [(0, 96), (96, 0), (96, 96), (192, 96), (144, 96), (480, 96), (48, 96)])
def test_a_stream_moves_the_bytes(reads, writes):
    parts = stream(reads, writes)
    assert (sum(read for _, read, _ in parts), sum(written for *_, written in parts)) == (reads, writes)
    ratios = {"add": (2, 1), "copy": (1, 1), "dot": (1, 0), "fill": (0, 1)}
    for kernel, read, written in parts:
        assert read * ratios[kernel][1] == written * ratios[kernel][0]
    Stream(reads, writes, Cpu())()


def checker_of(name, backward, variant="", dtype="bf16"):
    problem = load(name).problem(Setting(variant, 2, 37, "bwd", dtype))
    return Checker(problem, backward), problem


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gate_lets_right_ones_pass(backward, dtype):
    checker, problem = checker_of("activation_layer_norm", backward, dtype=dtype)
    for gate in (checker.candidate(problem.candidates["hbert"]), checker.baseline(problem.baselines["eager"])):
        assert gate.passed and gate.error > 0


def test_the_gate_refuses_a_wrong_output_and_a_wrong_gradient():
    checker, problem = checker_of("activation_layer_norm", True)
    right = problem.baselines["eager"]

    class LargerGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.05 * grad

    def wrong_gradient(x, *parameters):
        return right(LargerGradient.apply(x), *parameters)

    def wrong_output(x, *parameters):
        return right(x, *parameters) * 1.05

    def not_a_number(x, *parameters):
        return right(x, *parameters) * float("nan")

    for wrong in (wrong_gradient, wrong_output, not_a_number):
        for gate in (checker.candidate(wrong), checker.baseline(wrong)):
            assert not gate.passed


def test_the_gate_refuses_baselines_of_another_function():
    checker, problem = checker_of("activation_layer_norm", False)
    other = {"eager": lambda x, weight, bias: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)}
    problem = type(problem)(problem.activations, problem.parameters, problem.candidates, other)
    gate = Checker(problem, backward=False).baseline(other["eager"])
    assert gate.error > gate.allowed
