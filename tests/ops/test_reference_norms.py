"""Reference of layer_norm, add_layer_norm and activation_layer_norm against the formulas."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, formulas
from .checks import BF16, F32, F64

pytestmark = pytest.mark.usefixtures("reference")


def activation_pair(name):
    def bind(function):
        return lambda x, w, b, c, **options: function(x, w, b, activation=name, input_bias=c, **options)

    return bind(hk.activation_layer_norm), bind(formulas.activation_layer_norm)


# name: (op, formula, number of activations, number of parameters [H])
OPS = {
    "layer_norm": (hk.layer_norm, formulas.layer_norm, 1, 2),
    "add_layer_norm": (hk.add_layer_norm, formulas.add_layer_norm, 2, 2),
    **{name: (*activation_pair(name), 1, 3) for name in ("gelu", "gelu_tanh", "relu")},
}
each_op = pytest.mark.parametrize("name", OPS)


def problem(name, shape, mean=0.0):
    """Inputs of the op in float64, activations of this mean."""
    _, _, activations, parameters = OPS[name]
    inputs = [checks.randn(*shape) * 2 + mean for _ in range(activations)] + checks.affine(shape[-1])
    return inputs + [checks.randn(shape[-1]) for _ in range(parameters - 2)]


@each_op
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 1), (7, 2), (7, 1000), (37, 192), (129, 64), (1000, 7)])
def test_exact_in_float64(name, rows, width):
    op, formula, *_ = OPS[name]
    # With two features the gradient is a difference of nearly equal terms, divided by a possibly small deviation.
    checks.assert_exact(op, formula, problem(name, (rows, width)), 1e-12 if width > 2 else 1e-9)


@each_op
@pytest.mark.parametrize("shape", [(5,), (2, 3, 40), (2, 1, 3, 8)])
def test_any_leading_dimensions(name, shape):
    op, formula, *_ = OPS[name]
    checks.assert_exact(op, formula, problem(name, shape))


@each_op
@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize("shape", [(7, 192), (1000, 37)], ids=str)
def test_single_and_half_precision(name, shape, dtype, parameter):
    op, formula, activations, _ = OPS[name]
    checks.assert_within_policy(lambda: (op, formula, problem(name, shape)), dtype, parameter, activations)


@pytest.mark.parametrize(("x", "residual"), [(BF16, F32), (F32, BF16)], ids=str)
def test_residual_stream_of_another_dtype(x, residual):
    branch, stream, weight, bias = problem("add_layer_norm", (37, 64))
    branch, stream = branch.to(x), stream.to(residual)
    y, total = hk.add_layer_norm(branch, stream, weight.float(), bias.float())
    assert (y.dtype, total.dtype) == (x, F32)
    assert torch.equal(total, branch.float() + stream.float())
    exact = formulas.layer_norm(total.double(), weight, bias)
    assert checks.max_error(y, exact) <= 2 * torch.finfo(x).eps * exact.abs().max()


@each_op
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_large_means_do_not_cancel(name, mean, dtype):
    op, formula, *_ = OPS[name]
    inputs = [t.to(dtype) for t in problem(name, (37, 192), mean)]
    # The mean can be off by an ulp of itself, which the division by the deviation (2) blows up: the problem's own
    # error. E[x^2] - E[x]^2 would be off by the square of that.
    bound = 2 * torch.finfo(dtype).eps * mean / 2
    expected = checks.evaluate(formula, [t.double() for t in inputs])
    checks.assert_equal_to_rounding(checks.evaluate(op, inputs), expected, bound)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_an_inactive_row_gives_the_bias(name):
    x, weight, bias, input_bias = [t.requires_grad_() for t in problem(name, (7, 64), -1e4)]
    y = hk.activation_layer_norm(x, weight, bias, activation=name, input_bias=input_bias)
    assert torch.equal(y, bias.expand(7, 64))
    gradients = torch.autograd.grad(y.square().sum(), [x, weight, input_bias])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
@each_op
def test_parameters_are_optional(name, present):
    op, formula, activations, parameters = OPS[name]
    inputs = problem(name, (7, 40))
    weight = inputs[activations : activations + 1] if "weight" in present else []
    bias = inputs[activations + 1 : activations + 2] if "bias" in present else []

    def without(function):
        def call(*leaves):
            rest = list(leaves[activations:])
            affine = [rest.pop(0) if kept else None for kept in (weight, bias)]
            return function(*leaves[:activations], *affine, *[None] * (parameters - 2))

        return call

    checks.assert_exact(without(op), without(formula), [*inputs[:activations], *weight, *bias])


@each_op
def test_eps_is_added_to_the_variance(name):
    op, formula, *_ = OPS[name]
    checks.assert_exact(partial(op, eps=0.5), partial(formula, eps=0.5), [t * 1e-2 for t in problem(name, (7, 40))])


@each_op
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)], ids=str)
def test_no_rows(name, shape):
    op, _, activations, _ = OPS[name]
    checks.assert_zero_gradients(op, problem(name, shape), *[shape] * activations)


@each_op
def test_neighbours_change_no_bit(name):
    op, _, activations, _ = OPS[name]
    inputs = [t.float() for t in problem(name, (129, 192))]
    many = op(*inputs)
    alone = op(*[t[17:18] for t in inputs[:activations]], *inputs[activations:])
    for one, all_rows in zip(*[o if isinstance(o, tuple) else (o,) for o in (alone, many)], strict=True):
        assert torch.equal(one[0], all_rows[17])


@each_op
def test_nan_stays_in_its_row(name):
    op = OPS[name][0]
    inputs = problem(name, (5, 64))
    inputs[0][2, 3] = torch.nan
    y = op(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    assert y[[0, 1, 3, 4]].isfinite().all()


@each_op
def test_strides_do_not_matter(name):
    checks.assert_strides_do_not_matter(OPS[name][0], problem(name, (7, 40)))


@each_op
def test_gradcheck(name):
    checks.assert_gradcheck(OPS[name][0], problem(name, (3, 5)))


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "gelu"])
def test_compiles(name):
    checks.assert_compiles(OPS[name][0], [(problem(name, (rows, 24)), ()) for rows in (2, 37)])


@each_op
@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(rows=st.integers(1, 20), width=st.integers(8, 90), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_shape_and_scale(name, rows, width, scale):
    op, formula, activations, _ = OPS[name]
    inputs = problem(name, (rows, width))
    checks.assert_exact(op, formula, [t * scale for t in inputs[:activations]] + inputs[activations:], 1e-11)
