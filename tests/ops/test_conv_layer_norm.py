"""conv_layer_norm through the whole chain: public function, autograd, op, compiled kernel."""

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

each_reach = pytest.mark.parametrize("taps", [1, 3, 5])


def conv(lengths, width, taps=3, dtype=F32, parameter=None, **options):
    """The op as a function of x, taps, weight, bias, and these.

    The taps are flat: by that the policy knows parameters.
    """
    op, _, inputs = problem(f"conv{taps}", lengths, width, **options)
    x, conv_weight, *affine = cast(inputs, dtype, parameter)
    return lambda x, flat, *rest: op(x, flat.unflatten(0, (taps, width)), *rest), [x, conv_weight.flatten(), *affine]


@each_dtype
@pytest.mark.parametrize(("width", "heads"), kernel_checks.SIZES)
@pytest.mark.parametrize("lengths", [*LENGTHS, RAGGED], ids=str)
def test_accurate_at_odd_sizes(lengths, width, heads, dtype):
    assert_accurate(*conv(lengths, width, 3, dtype))


@each_dtype
@pytest.mark.parametrize("taps", [1, 5, 7, 9])
def test_any_number_of_taps(taps, dtype):
    assert_accurate(*conv([129, 1, 0, 63, 64, 65, 66], 40, taps, dtype))


@each_reach
@pytest.mark.parametrize("lengths", [[1], [2, 129, 0, 64, 65], RAGGED], ids=str)
def test_the_formula(lengths, taps):
    checks.assert_exact(*problem(f"conv{taps}", lengths, 100))


@pytest.mark.parametrize("affine", [F32, BF16], ids=str)
@pytest.mark.parametrize("taps", [F32, BF16], ids=str)
@pytest.mark.parametrize("x", [F32, BF16], ids=str)
def test_mixed_dtypes(x, taps, affine):
    op, (tokens, conv_weight, *parameters) = conv([37, 0, 70], 200, 3, x, affine)
    inputs = [tokens, conv_weight.to(taps), *parameters]
    assert_accurate(op, inputs)
    assert op(*inputs).dtype == x


@pytest.mark.parametrize("present", ["", "weight", "bias"])
def test_optional_parameters(present):
    cu, (x, taps, weight, bias) = cu_of([37, 5]), conv([37, 5], 100)[1]
    given = [weight] * (present == "weight") + [bias] * (present == "bias")

    def op(x, taps, parameter=None):
        affine = {"": (None, None), "weight": (parameter, None), "bias": (None, parameter)}[present]
        return hk.conv_layer_norm(x, *affine, taps.unflatten(0, (3, 100)), cu)

    assert_accurate(op, [x, taps, *given])


@each_dtype
def test_large_means_do_not_cancel(dtype):
    mean = 100.0 if dtype == BF16 else 1e4  # bfloat16 has hardly a bit left for the deviations
    assert_accurate(*conv([20, 17], 768, 3, dtype, mean=mean), mean * checks.FLOAT64_BOUND)


@each_dtype
def test_taps_of_zero_leave_the_norm(dtype):
    op, (x, taps, *affine) = conv([5, 70], 40, 5, dtype)
    assert torch.equal(op(x, torch.zeros_like(taps), *affine), hk.layer_norm(x, *affine))


@pytest.mark.parametrize("lengths", [[7] * 10_000, [1] * 70_000, [70_000]], ids=["short", "single", "one"])
def test_more_than_65536_rows(lengths):
    assert_accurate(*conv(lengths, 8))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths):
    checks.assert_zero_gradients(*conv(lengths, 64), (0, 64))


@each_reach
@each_dtype
def test_dead_rows_are_inert(dtype, taps):
    op, inputs = conv([*RAGGED, 100], 24, taps, dtype)
    checks.assert_dead_rows_are_inert(op, inputs, 1)
    kernel_checks.assert_gradients_of_dead_rows_are_not_read(op, inputs, dead=200)


def test_only_dead_rows():
    op, (_, *rest) = conv([0, 0], 24)
    checks.assert_zero_gradients(op, [torch.full((3, 24), torch.nan), *rest], (3, 24))


@each_dtype
def test_strides_do_not_matter(dtype):
    checks.assert_strides_do_not_matter(*conv([*RAGGED, 70], 40, 3, dtype))


@each_reach
@each_dtype
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(dtype, taps):
    lengths = [30, 200, 0, 7, 65]
    op, _, inputs = problem(f"conv{taps}", lengths, 192)
    x, *shared = cast(inputs, dtype)
    kernel_checks.assert_same_bits_for_any_threads_and_run(op, [x, *shared])
    kernel_checks.assert_neighbours_change_no_bit(lambda n: bind(f"conv{taps}", cu_of(n)), lengths, [x], (), shared)


@each_dtype
@pytest.mark.parametrize(("row", "reached"), [(14, slice(12, 17)), (10, slice(10, 13)), (18, slice(16, 19))])
def test_nan_reaches_as_far_as_the_taps_in_its_sequence(row, reached, dtype):
    op, inputs = conv([10, 9, 12], 40, 5, dtype)
    # The gradient of a row does not need the normalized rows around it.
    kernel_checks.assert_nan_stays(op, inputs, row, reached, slice(row, row + 1))
    assert op(*inputs)[reached].isnan().all()


@each_dtype
def test_opcheck(dtype):
    cu, (x, taps, *affine) = cu_of([4, 0, 5]), cast(problem("conv3", [4, 0, 5], 24)[2], dtype)
    namespace = torch.ops.hbert_kernels
    for weight, bias in (affine, (None, None)):
        torch.library.opcheck(namespace.conv_layer_norm.default, (x, weight, bias, taps, cu, 1e-5))
        y, mean, rstd = namespace.conv_layer_norm(x, weight, bias, taps, cu, 1e-5)
        backward = (y, x, mean, rstd, weight, bias, taps, cu)
        torch.library.opcheck(namespace.conv_layer_norm_backward.default, backward)


@each_reach
def test_gradcheck(taps):
    op, _, inputs = problem(f"conv{taps}", [2, 0, 1, 3], 4)
    checks.assert_gradcheck(op, inputs)


def test_compiles_without_graph_breaks_or_recompiles():
    # No two dimensions are equal in the first call, or the compiler would take them for the same one ever after.
    batches = ([3, 4, 6], [5, 7], [2, 0, 70, 9, 1])
    calls = [(cast(problem("conv3", lengths, 24)[2], F32), (cu_of(lengths),)) for lengths in batches]
    checks.assert_compiles(lambda x, taps, weight, bias, cu: bind("conv3", cu)(x, taps, weight, bias), calls)


def test_compiles_with_inductor():
    kernel_checks.assert_compiles_with_inductor(*conv([3, 4], 40))


def test_autocast_with_activation_checkpointing():
    linear, norm, cu = torch.nn.Linear(40, 24), hk.nn.ConvLayerNorm(24, 3), cu_of([4, 2])
    parameters = [*linear.parameters(), *norm.parameters()]
    kernel_checks.assert_checkpointing_under_autocast_changes_no_bit(
        lambda x: norm(linear(x), cu), parameters, 6, 40, BF16
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    width=st.integers(16, 130),
    taps=st.sampled_from([1, 3, 5, 9]),
    dtype=st.sampled_from([F32, BF16]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_accurate_for_any_lengths(lengths, width, taps, dtype, scale):
    op, (x, *rest) = conv(lengths, width, taps, dtype)
    assert_accurate(op, [x * scale, *rest])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(x=a["x"][0]), r"x must be \[rows, width\]"),
        (lambda a: dict(x=a["x"].half(), dy=a["dy"].half()), "x must be float32, bfloat16 or float64"),
        (lambda a: dict(conv_weight=a["conv_weight"][:2]), r"conv_weight must be \[taps, width\] with an odd number"),
        (lambda a: dict(conv_weight=a["conv_weight"][:, :-1]), r"conv_weight must be \[taps, width\]"),
        (lambda a: dict(conv_weight=a["conv_weight"][0]), r"conv_weight must be \[taps, width\]"),
        (lambda a: dict(conv_weight=a["conv_weight"].double()), "float64 does not mix"),
        (lambda a: dict(dy=a["dy"][1:]), r"dy must be \[9, 24\]"),
        (lambda a: dict(dy=a["dy"].bfloat16()), "dy must have the dtype of x"),
        (lambda a: dict(mean=a["mean"][1:]), "mean and rstd must be"),
        (lambda a: dict(rstd=a["rstd"].double()), "mean and rstd must be"),
        (lambda a: dict(bias=a["bias"][:-1]), "a parameter must have 24 values"),
        (lambda a: dict(cu_seqlens=a["cu_seqlens"].long()), r"cu_seqlens must be int32 \[B\+1\]"),
        (lambda a: dict(cu_seqlens=a["cu_seqlens"] + 1), "cu_seqlens must start at 0, got 1"),
        (lambda a: dict(cu_seqlens=cu_of([6, -2])), r"must not decrease, but cu_seqlens\[1\] = 6 > 4"),
        (lambda a: dict(cu_seqlens=cu_of([4, 6])), "cu_seqlens reaches 10, but there are only 9 tokens"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    cu, (x, taps, weight, bias) = cu_of([4, 5]), cast(problem("conv3", [4, 5], 24)[2], F32)
    y, mean, rstd = torch.ops.hbert_kernels.conv_layer_norm(x, weight, bias, taps, cu, 1e-5)
    arguments = dict(dy=y, x=x, mean=mean, rstd=rstd, weight=weight, bias=bias, conv_weight=taps, cu_seqlens=cu)
    kernel_checks.assert_op_refuses("conv_layer_norm_backward", arguments, change, message)
