"""layer_norm and add_layer_norm through the whole chain: public function, autograd, op, compiled kernel."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import hbert_kernels as hk
from hbert_kernels._accuracy import compare

from . import kernel_checks

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ROWS = [1, 7, 37, 129]
WIDTHS = [1, 7, 64, 192, 768, 1000, 1024]


@pytest.fixture(autouse=True)
def compiled_kernels():
    """Every test here is about the compiled kernel: none may pass on the reference path."""
    with hk.use_backend("cpp"):
        yield


def problem(rows, width, x=torch.float32, residual=None, parameter=None, mean=0.0):
    """x, residual, weight, bias of the given dtypes (default: x's)."""
    shapes = [
        ((rows, width), x),
        ((rows, width), residual or x),
        ((width,), parameter or x),
        ((width,), parameter or x),
    ]
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, dtype in shapes]
    tensors[0] = tensors[0] + mean
    return tensors


def assert_accurate(function, inputs):
    failed = [result for result in compare(function, inputs, "cpp") if not result.passed]
    assert not failed, failed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("rows", ROWS)
def test_accurate_at_odd_sizes(rows, width, dtype):
    x, residual, weight, bias = problem(rows, width, dtype)
    assert_accurate(hk.layer_norm, [x, weight, bias])
    assert_accurate(hk.add_layer_norm, [x, residual, weight, bias])


def test_a_row_of_one_element_is_the_bias():
    x, _, weight, bias = problem(5, 1)
    assert torch.equal(hk.layer_norm(x, weight, bias), bias.expand(5, 1))


@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(x, residual, parameter):
    inputs = problem(37, 200, x, residual, parameter)
    assert_accurate(hk.add_layer_norm, inputs)
    y, total = hk.add_layer_norm(*inputs)
    assert (y.dtype, total.dtype) == (x, torch.promote_types(x, residual))
    assert_accurate(hk.layer_norm, [inputs[0], *inputs[2:]])


@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
def test_optional_parameters(present):
    x, residual, weight, bias = problem(37, 100)
    kept = {name: tensor for name, tensor in (("weight", weight), ("bias", bias)) if name in present}
    chosen = list(kept.values())

    def named(function):
        return lambda *a: function(
            *a[: len(a) - len(chosen)], **dict(zip(kept, a[len(a) - len(chosen) :], strict=True))
        )

    assert_accurate(named(hk.layer_norm), [x, *chosen])
    assert_accurate(named(hk.add_layer_norm), [x, residual, *chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean_does_not_cancel(dtype):
    # E[x^2] - E[x]^2 would lose everything here in float32: the mean is 10,000 standard deviations.
    x, residual, weight, bias = problem(37, 768, dtype, mean=0 if dtype == torch.bfloat16 else 1e4)
    assert_accurate(hk.layer_norm, [x, weight, bias])
    assert_accurate(hk.add_layer_norm, [x, residual, weight, bias])


def test_more_than_65536_rows():
    x, residual, weight, bias = problem(70_000, 16)
    assert_accurate(hk.add_layer_norm, [x, residual, weight, bias])


@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64)])
def test_no_rows(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(64, requires_grad=True)
    y, total = hk.add_layer_norm(x, torch.randn(shape), weight)
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(64))


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 1, 5, 64)])
def test_any_leading_dimensions(shape):
    x, weight = torch.randn(shape), torch.randn(64)
    rows = hk.layer_norm(x.reshape(-1, 64), weight)
    assert torch.equal(hk.layer_norm(x, weight), rows.view(shape))


def test_non_contiguous_input():
    def strided(x, residual, weight, bias):
        return hk.add_layer_norm(x.t(), residual[:, ::2], weight[::2], bias.flip(0))

    inputs = [torch.randn(40, 13), torch.randn(13, 80), torch.randn(80), torch.randn(40)]
    assert_accurate(strided, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(dtype):
    x, residual, weight, bias = problem(301, 768, dtype)

    def everything():
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        outputs = hk.add_layer_norm(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    first = everything()
    torch.set_num_threads(1)
    for one, two in zip(first, everything(), strict=True):
        assert torch.equal(one, two)
    alone = hk.add_layer_norm(x[17:18], residual[17:18], weight, bias)
    assert torch.equal(alone[0][0], first[0][17])
    assert torch.equal(alone[1][0], first[1][17])


def test_nan_stays_in_its_row():
    x, _, weight, bias = problem(5, 100)
    x[2, 3] = float("nan")
    y = hk.layer_norm(x, weight, bias)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    x, residual, weight, bias = problem(7, 40, dtype)
    namespace = torch.ops.hbert_kernels
    for affine in [(weight, bias), (None, None), (weight, None)]:
        torch.library.opcheck(namespace.layer_norm.default, (x, *affine, 1e-5))
        torch.library.opcheck(namespace.add_layer_norm.default, (x, residual, *affine, 1e-5))
        _, total, mean, rstd = namespace.add_layer_norm(x, residual, *affine, 1e-5)
        for dtotal in (None, torch.randn_like(total)):
            torch.library.opcheck(namespace.layer_norm_backward.default, (x, dtotal, total, mean, rstd, *affine))


def test_gradcheck():
    inputs = [t.requires_grad_() for t in problem(3, 11, torch.float64)]
    assert torch.autograd.gradcheck(hk.add_layer_norm, inputs)
    assert torch.autograd.gradcheck(hk.layer_norm, [inputs[0], *inputs[2:]])


def test_only_the_norm_is_used():
    x, residual, weight, bias = problem(7, 40)
    assert_accurate(lambda *a: hk.add_layer_norm(*a)[0], [x, residual, weight, bias])


def test_only_the_sum_is_used():
    x, residual, weight, _ = (t.requires_grad_() for t in problem(7, 40))
    cotangent = torch.randn(7, 40)
    dx, dresidual, dweight = torch.autograd.grad(
        hk.add_layer_norm(x, residual, weight)[1], [x, residual, weight], cotangent
    )
    assert torch.equal(dx, cotangent)
    assert torch.equal(dresidual, cotangent)
    assert torch.equal(dweight, torch.zeros(40))


def test_compiles_without_graph_breaks_or_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()
    weight, bias = torch.randn(48, requires_grad=True), torch.randn(48, requires_grad=True)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(x, residual):
        y, total = hk.add_layer_norm(x, residual, weight, bias)
        return hk.layer_norm(total, weight) + y

    for rows in (2, 3, 17, 64):
        x, residual = torch.randn(rows, 48, requires_grad=True), torch.randn(rows, 48)
        y, total = hk.add_layer_norm(x, residual, weight, bias)
        expected = hk.layer_norm(total, weight) + y
        actual = step(x, residual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        for one, two in zip(
            torch.autograd.grad(actual.sum(), [x, weight]),
            torch.autograd.grad(expected.sum(), [x, weight]),
            strict=True,
        ):
            torch.testing.assert_close(one, two)
    assert counter.frame_count == 1


def test_compiles_with_inductor():
    torch._dynamo.reset()
    x, residual, weight, bias = problem(5, 40)
    x.requires_grad_()
    compiled = torch.compile(hk.add_layer_norm, fullgraph=True)
    for one, two in zip(compiled(x, residual, weight, bias), hk.add_layer_norm(x, residual, weight, bias), strict=True):
        assert torch.equal(one, two)
    compiled(x, residual, weight, bias)[0].square().sum().backward()
    assert x.grad.isfinite().all()


def test_compiles_given_a_tensor_twice():
    x, _, weight, _ = problem(5, 40, torch.float64)
    kernel_checks.assert_compiles_given_a_tensor_twice(lambda x, w: hk.add_layer_norm(x, x, w, w), [x, weight])


def test_autocast_with_activation_checkpointing():
    linear = torch.nn.Linear(40, 40)
    norm = hk.nn.AddLayerNorm(40)
    stream = torch.randn(6, 40)

    def block(x):
        branch, total = norm(linear(x), stream)
        return branch.float().square().mean() + total.square().mean()

    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = torch.ones(6, 40, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(x)
        loss.backward()
        gradients.append([x.grad, linear.weight.grad, norm.weight.grad])
        linear.zero_grad()
        norm.zero_grad()
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
    assert norm.weight.dtype == torch.float32


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 40),
    width=st.integers(8, 130),  # below, a row is so badly conditioned that plain torch's own error is a matter of luck
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    eps=st.sampled_from([1e-12, 1e-5]),
)
def test_accurate_for_any_shape(rows, width, dtype, scale, eps):
    x, residual, weight, bias = problem(rows, width, dtype)
    inputs = [x * scale, residual * scale, weight, bias]
    assert_accurate(lambda *a: hk.add_layer_norm(*a, eps=eps), inputs)


def test_double_backward_says_that_there_is_none():
    x = torch.randn(3, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(hk.layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(dy=a["dy"][:, :-1]), r"dy must be \[5, 24\]"),
        (lambda a: a.update(mean=a["mean"].double()), "mean and rstd must be"),
        (lambda a: a.update(dy=a["dy"].double()), "dy must have the dtype"),
        (lambda a: a.update(x=a["x"][0]), "x must be"),
        (lambda a: a.update(weight=a["weight"][:-1]), "a parameter must have 24 values"),
        (lambda a: a.update(weight=a["weight"].double()), "float64 does not mix"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    x, dy, weight, bias = problem(5, 24)
    _, mean, rstd = torch.ops.hbert_kernels.layer_norm(x, weight, bias, 1e-5)
    arguments = dict(dy=dy, dtotal=None, x=x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hbert_kernels.layer_norm_backward(**arguments)
