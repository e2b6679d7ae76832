"""gated_layer_norm through the whole chain: public function, autograd, op, compiled kernel."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, kernel_checks
from .checks import BF16, F32, RAGGED, cu_of
from .kernel_checks import LENGTHS, assert_accurate, cast, each_dtype
from .kernel_checks import compiled_kernels as compiled_kernels
from .test_reference_packed_norms import bind, problem


def gated(lengths, width, dtype=F32, parameter=None, **options):
    """The op as a function of x, gate, weight, bias, and these."""
    op, _, inputs = problem("gated", lengths, width, **options)
    return op, cast(inputs, dtype, parameter)


@each_dtype
@pytest.mark.parametrize(("width", "heads"), kernel_checks.SIZES)
@pytest.mark.parametrize("lengths", [*LENGTHS, RAGGED], ids=str)
def test_accurate_at_odd_sizes(lengths, width, heads, dtype):
    assert_accurate(*gated(lengths, width, dtype))


@pytest.mark.parametrize("lengths", [[1], [129, 0, 64, 65], RAGGED], ids=str)
def test_the_formula(lengths):
    checks.assert_exact(*problem("gated", lengths, 100))


@pytest.mark.parametrize("affine", [F32, BF16], ids=str)
@pytest.mark.parametrize("gate", [F32, BF16], ids=str)
@pytest.mark.parametrize("x", [F32, BF16], ids=str)
def test_mixed_dtypes(x, gate, affine):
    op, (tokens, gates, *parameters) = gated([37, 0, 70], 200, x, affine)
    inputs = [tokens, gates.to(gate), *parameters]
    assert_accurate(op, inputs)
    assert op(*inputs).dtype == x


@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
def test_optional_parameters(present):
    cu, (x, gate, weight, bias) = cu_of([37, 5]), gated([37, 5], 100)[1]
    kept = {name: t for name, t in (("weight", weight), ("bias", bias)) if name in present}
    assert_accurate(
        lambda x, gate, *given: hk.gated_layer_norm(x, gate, cu, **dict(zip(kept, given, strict=True))),
        [x, gate, *kept.values()],
    )


@each_dtype
def test_large_means_do_not_cancel(dtype):
    mean = 100.0 if dtype == BF16 else 1e4  # bfloat16 has hardly a bit left for the deviations
    op, (x, gate, *affine) = gated([20, 17], 768, dtype, mean=mean)
    even = torch.full_like(gate, 1.5)  # a gate of random signs would take the mean away
    assert_accurate(op, [x, even, *affine], mean * checks.FLOAT64_BOUND)


@each_dtype
def test_a_closed_gate_gives_the_bias(dtype):
    op, (x, gate, weight, bias) = gated([5, 3], 40, dtype)
    gate[1] = 0
    values = kernel_checks.evaluate(op, [x, gate, weight, bias])
    assert torch.equal(values["output 0"][5:], bias.expand(3, 40))
    assert torch.equal(values["gradient 0"][5:], torch.zeros_like(x[5:]))
    assert_accurate(op, [x, gate, weight, bias])


@pytest.mark.parametrize("lengths", [[7] * 10_000, [1] * 70_000, [70_000]], ids=["short", "single", "one"])
def test_more_than_65536_rows(lengths):
    assert_accurate(*gated(lengths, 8))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths):
    checks.assert_zero_gradients(*gated(lengths, 64), (0, 64))


@each_dtype
def test_dead_rows_are_inert(dtype):
    op, inputs = gated([*RAGGED, 100], 24, dtype)
    checks.assert_dead_rows_are_inert(op, inputs, 1)
    kernel_checks.assert_gradients_of_dead_rows_are_not_read(op, inputs, dead=200)


def test_only_dead_rows():
    op, (_, *rest) = gated([0, 0], 24)
    checks.assert_zero_gradients(op, [torch.full((3, 24), torch.nan), *rest], (3, 24))


@each_dtype
def test_strides_do_not_matter(dtype):
    checks.assert_strides_do_not_matter(*gated([*RAGGED, 70], 40, dtype))


@each_dtype
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(dtype):
    lengths = [30, 200, 0, 7, 65]
    op, (x, gate, *affine) = gated(lengths, 192, dtype)
    kernel_checks.assert_same_bits_for_any_threads_and_run(op, [x, gate, *affine])
    kernel_checks.assert_neighbours_change_no_bit(lambda n: bind("gated", cu_of(n)), lengths, [x], [gate], affine)


@each_dtype
def test_nan_stays_in_its_row(dtype):
    op, inputs = gated([10, 9, 12], 40, dtype)
    kernel_checks.assert_nan_stays(op, inputs, 14, slice(14, 15), slice(14, 15))
    assert op(*inputs)[14].isnan().all()


@each_dtype
def test_opcheck(dtype):
    cu, (x, gate, *affine) = cu_of([4, 0, 5]), gated([4, 0, 5], 24, dtype)[1]
    gate = gate.float() if dtype == BF16 else gate
    namespace = torch.ops.hbert_kernels
    for weight, bias in (affine, (None, None)):
        torch.library.opcheck(namespace.gated_layer_norm.default, (x, gate, cu, weight, bias, 1e-5))
        y, mean, rstd = namespace.gated_layer_norm(x, gate, cu, weight, bias, 1e-5)
        backward = (y, x, gate, cu, mean, rstd, weight, bias)
        torch.library.opcheck(namespace.gated_layer_norm_backward.default, backward)


def test_gradcheck():
    op, _, inputs = problem("gated", [2, 0, 3], 5)
    checks.assert_gradcheck(op, inputs)


def test_compiles_without_graph_breaks_or_recompiles():
    calls = [(gated(lengths, 24)[1], (cu_of(lengths),)) for lengths in ([3, 4], [5, 0, 7], [2, 70, 9, 1])]
    checks.assert_compiles(lambda x, gate, weight, bias, cu: bind("gated", cu)(x, gate, weight, bias), calls)


def test_compiles_with_inductor():
    kernel_checks.assert_compiles_with_inductor(*gated([3, 4], 40))


def test_autocast_with_activation_checkpointing():
    linear, norm = torch.nn.Linear(40, 24), torch.nn.LayerNorm(24)
    gate, cu = torch.randn(2, 24, requires_grad=True), cu_of([4, 2])
    kernel_checks.assert_checkpointing_under_autocast_changes_no_bit(
        lambda x: hk.gated_layer_norm(linear(x), gate, cu, norm.weight, norm.bias),
        [linear.weight, gate, norm.weight, norm.bias], 6, 40, BF16,
    )  # fmt: skip


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    width=st.integers(16, 130),
    dtype=st.sampled_from([F32, BF16]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_accurate_for_any_lengths(lengths, width, dtype, scale):
    op, (x, *rest) = gated(lengths, width, dtype)
    assert_accurate(op, [x * scale, *rest])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(x=a["x"][0]), r"x must be \[rows, width\]"),
        (lambda a: dict(x=a["x"].half()), "x must be float32, bfloat16 or float64"),
        (lambda a: dict(gate=a["gate"][:1]), r"gate must be \[2, 24\]"),
        (lambda a: dict(gate=a["gate"].bfloat16()), "gate must have the compute dtype"),
        (lambda a: dict(dy=a["dy"][1:]), r"dy must be \[9, 24\]"),
        (lambda a: dict(dy=a["dy"].bfloat16()), "dy must have the dtype of x"),
        (lambda a: dict(mean=a["mean"][1:]), "mean and rstd must be"),
        (lambda a: dict(rstd=a["rstd"][::2]), "mean and rstd must be"),
        (lambda a: dict(weight=a["weight"][:-1]), "a parameter must have 24 values"),
        (lambda a: dict(weight=a["weight"].double()), "float64 does not mix"),
        (lambda a: dict(cu_seqlens=a["cu_seqlens"].long()), r"cu_seqlens must be int32 \[B\+1\]"),
        (lambda a: dict(cu_seqlens=a["cu_seqlens"][:0]), r"cu_seqlens must be int32 \[B\+1\]"),
        (lambda a: dict(cu_seqlens=a["cu_seqlens"] + 1), "cu_seqlens must start at 0, got 1"),
        (lambda a: dict(cu_seqlens=cu_of([6, -2])), r"must not decrease, but cu_seqlens\[1\] = 6 > 4"),
        (lambda a: dict(cu_seqlens=cu_of([4, 6])), "cu_seqlens reaches 10, but there are only 9 tokens"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    cu, (x, gate, weight, bias) = cu_of([4, 5]), gated([4, 5], 24)[1]
    y, mean, rstd = torch.ops.hbert_kernels.gated_layer_norm(x, gate, cu, weight, bias, 1e-5)
    arguments = dict(dy=y, x=x, gate=gate, cu_seqlens=cu, mean=mean, rstd=rstd, weight=weight, bias=bias)
    kernel_checks.assert_op_refuses("gated_layer_norm_backward", arguments, change, message)
