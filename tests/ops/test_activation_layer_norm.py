"""activation_layer_norm through the whole chain: public function, autograd, op, compiled kernel."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk
from hbert_kernels._accuracy import evaluate
from hbert_kernels.ops.activation_layer_norm import ACTIVATIONS

from . import checks, kernel_checks
from .checks import BF16, F32
from .kernel_checks import assert_accurate, cast, each_dtype
from .kernel_checks import compiled_kernels as compiled_kernels
from .test_reference_norms import OPS, problem

each_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def op_of(name):
    return OPS[name][0]


@each_dtype
@each_activation
@pytest.mark.parametrize(
    ("rows", "width"), [(7, 8), (37, 24), (1, 64), (129, 64), (37, 192), (129, 768), (7, 1000), (37, 1024)]
)
def test_accurate_at_odd_sizes(rows, width, name, dtype):
    assert_accurate(op_of(name), cast(problem(name, (rows, width)), dtype))


@each_dtype
@each_activation
def test_accurate_over_a_thousand_rows(name, dtype):
    assert_accurate(op_of(name), cast(problem(name, (1000, 40)), dtype))


@each_activation
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (37, 100), (129, 7)])
def test_the_formula(name, rows, width):
    op, formula, *_ = OPS[name]
    checks.assert_exact(op, formula, problem(name, (rows, width)))


@each_activation
@pytest.mark.parametrize("bias", [F32, BF16], ids=str)
@pytest.mark.parametrize("parameter", [F32, BF16], ids=str)
@pytest.mark.parametrize("x", [F32, BF16], ids=str)
def test_mixed_dtypes(x, parameter, bias, name):
    *inputs, input_bias = cast(problem(name, (37, 200)), x, parameter)
    assert_accurate(op_of(name), [*inputs, input_bias.to(bias)])
    assert op_of(name)(*inputs, input_bias.to(bias)).dtype == x


@each_activation
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("input_bias",), ("weight", "bias", "input_bias")], ids=str)
def test_optional_parameters(absent, name):
    given = dict(zip(("x", "weight", "bias", "input_bias"), problem(name, (37, 100)), strict=True))
    kept = {key: tensor.float() for key, tensor in given.items() if key not in absent}
    assert_accurate(
        lambda *tensors: hk.activation_layer_norm(**dict(zip(kept, tensors, strict=True)), activation=name),
        list(kept.values()),
    )


@each_dtype
@each_activation
def test_accurate_over_the_whole_range_of_the_activation(name, dtype):
    x, *parameters = cast(problem(name, (7, 400)), dtype)
    assert_accurate(op_of(name), [torch.linspace(-9, 9, 2800).view(400, 7).t().to(dtype), *parameters])
    assert_accurate(op_of(name), [x * 30, *parameters])


@each_dtype
@each_activation
@pytest.mark.parametrize("size", [1e4, 1e12, 3e13])
def test_accurate_far_outside_of_it(size, name, dtype):
    x, *parameters = cast(problem(name, (7, 40)), dtype)
    x[1, :3], x[2, :3] = -size, size
    assert_accurate(op_of(name), [x, *parameters])


@each_dtype
@each_activation
def test_inactive_rows_are_the_bias(name, dtype):
    # Whatever an approximation leaves of the tail may be far below the resolution of an activation, but a row that has
    # nothing else is divided by sqrt(eps), and x is not bounded.
    x, weight, bias, input_bias = cast(problem(name, (7, 100)), dtype)
    values = evaluate(op_of(name), [-10 - 1000 * x.abs(), weight, bias, torch.zeros_like(input_bias)])
    assert torch.equal(values["output 0"], bias.expand(7, 100))
    assert values["gradient 0"].abs().max() < 1e-15


@each_dtype
@each_activation
def test_large_means_do_not_cancel(name, dtype):
    mean = 100.0 if dtype == BF16 else 1e4  # bfloat16 has hardly a bit left for the deviations
    assert_accurate(op_of(name), cast(problem(name, (37, 768), mean), dtype), mean * checks.FLOAT64_BOUND)


def test_more_than_65536_rows():
    assert_accurate(op_of("gelu"), cast(problem("gelu", (70_000, 8)), F32))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape):
    checks.assert_zero_gradients(op_of("gelu"), cast(problem("gelu", shape), F32), shape)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 1, 5, 64)])
def test_any_leading_dimensions(shape):
    x, *parameters = cast(problem("gelu", shape), F32)
    rows = op_of("gelu")(x.reshape(-1, 64), *parameters)
    assert torch.equal(op_of("gelu")(x, *parameters), rows.view(shape))


@each_dtype
def test_strides_do_not_matter(dtype):
    checks.assert_strides_do_not_matter(op_of("gelu"), cast(problem("gelu", (13, 40)), dtype))


@each_dtype
@each_activation
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(name, dtype):
    x, *parameters = cast(problem(name, (301, 768)), dtype)
    kernel_checks.assert_same_bits_for_any_threads_and_run(op_of(name), [x, *parameters])
    alone, together = op_of(name)(x[17:18], *parameters), op_of(name)(x, *parameters)
    assert torch.equal(alone[0], together[17])


@each_dtype
@each_activation
def test_nan_stays_in_its_row(name, dtype):
    inputs = cast(problem(name, (5, 100)), dtype)
    kernel_checks.assert_nan_stays(op_of(name), inputs, 2, slice(2, 3), slice(2, 3))
    assert op_of(name)(*inputs)[2].isnan().all()


@each_dtype
def test_opcheck(dtype):
    x, *affine, input_bias = cast(problem("gelu", (7, 40)), dtype)
    namespace = torch.ops.hbert_kernels
    given = [(*affine, input_bias), (None, None, None), (None, affine[1], None)]
    for activation, (weight, bias, added) in enumerate(given):
        forward = (x, weight, bias, 1e-5, activation, added)
        torch.library.opcheck(namespace.activation_layer_norm.default, forward)
        y, mean, rstd = namespace.activation_layer_norm(*forward)
        backward = (y, x, mean, rstd, weight, bias, activation, added)
        torch.library.opcheck(namespace.activation_layer_norm_backward.default, backward)


@each_activation
def test_gradcheck(name):
    checks.assert_gradcheck(op_of(name), problem(name, (3, 7)))


def test_compiles_without_graph_breaks_or_recompiles():
    calls = [(cast(problem("gelu", (rows, 48)), F32), ()) for rows in (2, 3, 17, 64)]
    checks.assert_compiles(lambda x, *p: op_of("relu")(op_of("gelu")(x, *p), *p), calls)


def test_compiles_with_inductor():
    kernel_checks.assert_compiles_with_inductor(op_of("gelu_tanh"), cast(problem("gelu_tanh", (5, 40)), F32))


def test_autocast_with_activation_checkpointing():
    network = torch.nn.Sequential(torch.nn.Linear(40, 24), hk.nn.ActivationLayerNorm(24, activation="gelu"))
    parameters = list(network.parameters())
    kernel_checks.assert_checkpointing_under_autocast_changes_no_bit(network, parameters, 6, 40, BF16)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 40),
    width=st.integers(16, 130),  # below, a row is so badly conditioned that plain torch's own error is a matter of luck
    dtype=st.sampled_from([F32, BF16]),
    name=st.sampled_from(list(ACTIVATIONS)),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_accurate_for_any_shape(rows, width, dtype, name, scale):
    x, *parameters = problem(name, (rows, width))
    assert_accurate(op_of(name), cast([x * scale, *parameters], dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(x=a["x"][0]), r"x must be \[rows, width\]"),
        (lambda a: dict(x=a["x"].half()), "x must be float32, bfloat16 or float64"),
        (lambda a: dict(dy=a["dy"][:, :-1]), r"dy must be \[5, 24\]"),
        (lambda a: dict(dy=a["dy"].bfloat16()), "dy must have the dtype of x"),
        (lambda a: dict(mean=a["mean"][1:]), "mean and rstd must be"),
        (lambda a: dict(rstd=a["rstd"].double()), "mean and rstd must be"),
        (lambda a: dict(weight=a["weight"][:-1]), "a parameter must have 24 values"),
        (lambda a: dict(input_bias=a["input_bias"].double()), "float64 does not mix"),
        (lambda a: dict(activation=3), r"activation must be 0 \(gelu\), 1 \(gelu_tanh\) or 2 \(relu\), got 3"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    x, weight, bias, input_bias = cast(problem("gelu", (5, 24)), F32)
    y, mean, rstd = torch.ops.hbert_kernels.activation_layer_norm(x, weight, bias, 1e-5, 0, input_bias)
    arguments = dict(dy=y, x=x, mean=mean, rstd=rstd, weight=weight, bias=bias, activation=0, input_bias=input_bias)
    kernel_checks.assert_op_refuses("activation_layer_norm_backward", arguments, change, message)


def test_double_backward_says_that_there_is_none():
    x = torch.randn(3, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(hk.activation_layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
