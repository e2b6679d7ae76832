"""Reference of gated_layer_norm and conv_layer_norm against the formulas."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, formulas
from .checks import BF16, F32, ODD_LENGTHS, RAGGED, affine, cu_of, randn

pytestmark = pytest.mark.usefixtures("reference")
each_op = pytest.mark.parametrize("name", ["gated", "conv1", "conv3", "conv5"])


def bind(name, cu, function_of=hk, **options):
    """The op as a function of its floating inputs."""
    if name == "gated":
        return lambda x, gate, w, b: function_of.gated_layer_norm(x, gate, cu, w, b, **options)
    return lambda x, taps, w, b: function_of.conv_layer_norm(x, w, b, taps, cu, **options)


def problem(name, lengths, width, mean=0.0):
    """The op, its formula and the inputs: x, the gate or the taps, weight, bias."""
    cu = cu_of(lengths)
    second = randn(len(lengths), width) if name == "gated" else randn(int(name[-1]), width)
    inputs = [randn(sum(lengths), width) * 2 + mean, second, *affine(width)]
    return bind(name, cu), bind(name, cu, formulas), inputs


@each_op
@pytest.mark.parametrize(("lengths", "width"), [*((n, 64) for n in ODD_LENGTHS), ([37, 2], 1000), ([7], 192)], ids=str)
def test_exact_in_float64(name, lengths, width):
    checks.assert_exact(*problem(name, lengths, width))


@each_op
@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("lengths", [[37, 0, 92, 2], [1000]], ids=str)
def test_single_and_half_precision(name, lengths, dtype, parameter):
    checks.assert_within_policy(lambda: problem(name, lengths, 64), dtype, parameter)


@each_op
def test_large_means_do_not_cancel(name):
    op, formula, inputs = problem(name, [20, 17], 192, mean=1e4)
    if name == "gated":
        inputs[1].fill_(1.5)  # a gate of random signs would take the mean away
    inputs = [t.float() for t in inputs]
    expected = checks.evaluate(formula, [t.double() for t in inputs])
    # An ulp of the mean over the deviation (2): see the test of the same name of the plain norms.
    bound = 2 * torch.finfo(F32).eps * 1e4 / 2
    checks.assert_equal_to_rounding(checks.evaluate(op, inputs), expected, bound)


@each_op
def test_eps_and_no_parameters(name):
    cu = cu_of(RAGGED)
    x, second, *_ = problem(name, RAGGED, 24)[2]
    op, formula = (bind(name, cu, module, eps=0.5) for module in (hk, formulas))
    checks.assert_exact(
        lambda x, second: op(x, second, None, None), lambda x, second: formula(x, second, None, None), [x, second]
    )


@pytest.mark.parametrize("name", ["gated", "conv3"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_no_tokens(name, lengths):
    op, _, inputs = problem(name, lengths, 64)
    checks.assert_zero_gradients(op, inputs, (0, 64))


@each_op
@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_dead_rows_are_inert(name, dtype):
    op, _, inputs = problem(name, RAGGED, 24)
    checks.assert_dead_rows_are_inert(op, [t.to(dtype) for t in inputs], 1)


@each_op
def test_only_dead_rows(name):
    op, _, inputs = problem(name, [0, 0], 24)
    inputs[0] = torch.full((3, 24), torch.nan, dtype=torch.float64)
    checks.assert_zero_gradients(op, inputs, (3, 24))


@each_op
def test_neighbours_change_no_bit(name):
    lengths = [3, 8, 0, 21]
    op, _, inputs = problem(name, lengths, 192)
    x, second, weight, bias = (t.float() for t in inputs)
    many = op(x, second, weight, bias)
    own = second[3:] if name == "gated" else second
    assert torch.equal(bind(name, cu_of([21]))(x[11:], own, weight, bias), many[11:])
    x[3:11] = torch.nan
    assert torch.equal(op(x, second, weight, bias)[11:], many[11:])


def test_convolution_taps_look_both_ways():
    x, taps = randn(4, 64), torch.zeros(3, 64, dtype=torch.float64)
    taps[2] = 10.0
    normed = formulas.layer_norm(x)
    following = torch.cat([normed[1:], normed.new_zeros(1, 64)])
    actual = hk.conv_layer_norm(x, None, None, taps, cu_of([4]))
    checks.assert_equal_to_rounding({"y": actual}, {"y": normed + 10 * following})


@each_op
def test_strides_do_not_matter(name):
    op, _, inputs = problem(name, RAGGED, 40)
    checks.assert_strides_do_not_matter(op, inputs)


@each_op
def test_gradcheck(name):
    op, _, inputs = problem(name, [2, 0, 1], 5)
    checks.assert_gradcheck(op, inputs)


@pytest.mark.parametrize("name", ["gated", "conv3"])
def test_compiles(name):
    def function(x, second, weight, bias, cu):
        return bind(name, cu)(x, second, weight, bias)

    calls = [(problem(name, lengths, 24)[2], (cu_of(lengths),)) for lengths in ([3, 4, 6, 1], [2, 30])]
    checks.assert_compiles(function, calls)


@pytest.mark.parametrize("name", ["gated", "conv5"])
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any))
def test_any_lengths(name, lengths):
    checks.assert_exact(*problem(name, lengths, 16))
