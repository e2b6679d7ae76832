"""quantize_rows and the norms with int8 rows as output: public functions, ops, compiled kernels, reference."""

import pytest
import torch

import hbert_kernels as hk
from hbert_kernels._accuracy import error_bound, max_error
from hbert_kernels.ops.int8_norm import quantize_rows_reference

from . import formulas
from .checks import BF16, F32, F64, RAGGED, cu_of
from .kernel_checks import compiled_kernels as compiled_kernels

ROWS = [0, 1, 7, 37, 129]
WIDTHS = [1, 7, 64, 192, 768, 1000, 3072]
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
LEAST = 2.0**-119


def drawn(rows, width, dtype=F32, *more):
    """x [rows, width], then vectors [width] and what is named by its shape, in the dtype."""
    shapes = [(rows, width), *((width,) if m == "vector" else m for m in more)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def norms(rows, width, dtype, keep=True):
    """Of each norm: its name, the int8 rows, y as kept, y as it should be, y of the same rows in float32."""
    x, r, w, b, taps = drawn(rows, width, dtype, (rows, width), "vector", "vector", (3, width))
    cu = cu_of([rows // 3, 0, rows - rows // 3])
    quantized, y = hk.layer_norm_int8(x, w, b, keep=keep)
    yield "plain", quantized, y, hk.layer_norm(x, w, b), hk.layer_norm(x.float(), w, b)
    quantized, y, total = hk.add_layer_norm_int8(x, r, w, b, keep=keep)
    expected, expected_total = hk.add_layer_norm(x, r, w, b)
    assert torch.equal(total, expected_total)
    yield "residual", quantized, y, expected, hk.layer_norm(total.float(), w, b)
    quantized, y = hk.conv_layer_norm_int8(x, w, b, taps, cu, keep=keep)
    yield "conv", quantized, y, hk.conv_layer_norm(x, w, b, taps, cu), hk.conv_layer_norm(x.float(), w, b, taps, cu)
    for name in ("gelu", "gelu_tanh", "relu"):
        quantized = hk.activation_layer_norm_int8(x, w, b, activation=name, input_bias=b)
        y = hk.activation_layer_norm(x.float(), w, b, activation=name, input_bias=b)
        yield name, quantized, None, None, y


def same(one, other):
    """The same numbers, NaN where NaN is."""
    equal = (one.scale == other.scale) | (one.scale.isnan() & other.scale.isnan())
    return torch.equal(one.values, other.values) and bool(equal.all())


def dequantized(rows):
    return rows.values.double() * rows.scale.double()[:, None]


@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_quantized_rows_are_those_of_the_formula(rows, width, dtype):
    (x,) = drawn(rows, width, dtype)
    values, scale = hk.quantize_rows(x * 10)
    assert (values.dtype, scale.dtype, values.shape, scale.shape) == (torch.int8, F32, (rows, width), (rows,))
    for row, q, s in zip((x * 10).float(), values, scale, strict=True):
        largest = row.abs().max()
        assert s == largest / 127
        inverse = torch.tensor(127.0) / largest  # torch computes 127 / largest as 127 (1 / largest)
        assert torch.equal(q.float(), torch.round(row * inverse))
        assert q.abs().max() == 127
        # Rounding to the nearest: at most half a step, and what rounding in float32 adds.
        assert max_error(q.double() * s.double(), row.double()) <= 0.5001 * float(s)


@each_dtype
def test_ties_go_to_even(dtype):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.0, -127.0]], dtype=dtype)
    assert hk.quantize_rows(x).values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -127]]


@each_dtype
@pytest.mark.parametrize("width", [1, 8, 9, 100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_zeros_with_scale_nan(bad, width, dtype):
    (x,) = drawn(5, width, dtype)
    clean = hk.quantize_rows(x)
    x[2, width - 1] = bad
    values, scale = hk.quantize_rows(x)
    assert scale[2].isnan()
    assert not values[2].any()
    others = [0, 1, 3, 4]
    assert torch.equal(values[others], clean.values[others])
    assert torch.equal(scale[others], clean.scale[others])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, LEAST / 2])
def test_rows_of_zeros_and_next_to_zero_have_scale_zero(value):
    values, scale = hk.quantize_rows(torch.full((3, 11), value))
    assert not values.any()
    assert torch.equal(scale, torch.zeros(3))


@pytest.mark.parametrize("value", [LEAST, 1e-30, 3.4e38])
def test_the_least_and_the_largest_rows(value):
    values, scale = hk.quantize_rows(torch.tensor([[value, -value, value / 2, 0]]))
    assert values.tolist() == [[127, -127, 64, 0]]
    assert float(scale) == float(torch.tensor(value) / 127)


@each_dtype
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_an_activation_before_the_rows_are_quantized(name, dtype):
    (x,) = drawn(37, 200, dtype)
    rows = hk.quantize_rows(x, activation=name)
    exact = formulas.activate(x.double(), name)
    error = (dequantized(rows) - exact).abs().amax(1)
    # Beside half a step: the activations are within 1.9e-7 max(1, |x|) of the exact ones (isa/activation.h).
    assert (error <= 0.5001 * rows.scale + 1e-6).all()


@each_dtype
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("rows", ROWS)
def test_norms_are_quantized_as_their_unrounded_output(rows, width, dtype):
    for name, quantized, kept, expected, exact in norms(rows, width, dtype):
        assert same(quantized, hk.quantize_rows(exact)), name
        if kept is not None:
            assert torch.equal(kept, expected), name


def test_what_is_not_kept_is_not_returned():
    for _, _, kept, _, _ in norms(7, 24, F32, keep=False):
        assert kept is None


@each_dtype
@pytest.mark.parametrize("width", [64, 1000])
def test_norms_are_within_half_a_step_of_the_formula(width, dtype):
    x, w, b = drawn(37, width, dtype, "vector", "vector")
    exact = formulas.layer_norm(x.double(), w.double(), b.double())
    plain = formulas.layer_norm(x.float(), w.float(), b.float())
    bound = error_bound(exact, max_error(plain, exact), F32)
    rows, _ = hk.layer_norm_int8(x, w, b)
    error = (dequantized(rows) - exact).abs().amax(1)
    assert (error <= 0.5001 * rows.scale + bound).all()
    assert max_error(127 * rows.scale, exact.abs().amax(1)) <= bound + 1e-6


@pytest.mark.parametrize("residual", [F32, BF16], ids=str)
@pytest.mark.parametrize("parameter", [F32, BF16], ids=str)
@each_dtype
def test_mixed_dtypes(dtype, residual, parameter):
    x, r, w, b = drawn(37, 200, F32, (37, 200), "vector", "vector")
    x, r, w, b = x.to(dtype), r.to(residual), w.to(parameter), b.to(parameter)
    rows, y, total = hk.add_layer_norm_int8(x, r, w, b, keep=True)
    assert (y.dtype, total.dtype) == (dtype, torch.promote_types(dtype, residual))
    assert same(rows, hk.quantize_rows(hk.layer_norm(total.float(), w, b)))
    bare, _ = hk.layer_norm_int8(x)
    assert same(bare, hk.quantize_rows(hk.layer_norm(x.float())))


@each_dtype
def test_the_reference_gives_the_same_numbers(dtype):
    (x,) = drawn(37, 200, dtype)
    x[3], x[4, 5], x[6, 7] = 0, torch.nan, torch.inf
    with hk.use_backend("reference"):
        plain = hk.quantize_rows(x)
    assert same(plain, hk.quantize_rows(x))
    torch.manual_seed(1)
    compiled = list(norms(37, 200, dtype))
    torch.manual_seed(1)
    with hk.use_backend("reference"):
        reference = list(norms(37, 200, dtype))
    for (name, one, kept, *_), (_, other, other_kept, *_) in zip(compiled, reference, strict=True):
        assert max_error(one.scale, other.scale.double()) <= 1e-6 * float(other.scale.max()), name
        # Rows that differ in their last bits may fall on either side of a tie.
        difference = (one.values.int() - other.values.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 1e-3, name
        if kept is not None:
            torch.testing.assert_close(kept, other_kept)


@each_dtype
def test_dead_rows_are_zeros_and_are_not_read(dtype):
    lengths = [*RAGGED, 70]
    x, w, b, taps = drawn(sum(lengths), 24, dtype, "vector", "vector", (5, 24))
    dead = torch.cat([x, x.new_full((3, 24), torch.nan)])
    rows, y = hk.conv_layer_norm_int8(x, w, b, taps, cu_of(lengths), keep=True)
    longer, longer_y = hk.conv_layer_norm_int8(dead, w, b, taps, cu_of(lengths), keep=True)
    for one, many in ((rows.values, longer.values), (rows.scale, longer.scale), (y, longer_y)):
        assert torch.equal(many[: len(one)], one)
        assert torch.equal(many[len(one) :], torch.zeros_like(many[len(one) :]))


def test_strides_do_not_matter():
    x, r = torch.randn(40, 26).t()[::2], torch.randn(13, 80)[:, ::2]
    w, b = torch.randn(80)[::2], torch.randn(40).flip(0)
    assert same(hk.quantize_rows(x), hk.quantize_rows(x.contiguous()))
    rows, y, total = hk.add_layer_norm_int8(x, r, w, b, keep=True)
    expected, expected_total = hk.add_layer_norm(x, r, w, b)
    assert torch.equal(y, expected) and torch.equal(total, expected_total)
    assert same(rows, hk.quantize_rows(expected))


@each_dtype
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(dtype):
    x, r, w, b = drawn(301, 768, dtype, (301, 768), "vector", "vector")
    first, _, _ = hk.add_layer_norm_int8(x, r, w, b)
    torch.set_num_threads(1)
    assert same(first, hk.add_layer_norm_int8(x, r, w, b)[0])
    alone, _, _ = hk.add_layer_norm_int8(x[17:18], r[17:18], w, b)
    assert torch.equal(alone.values[0], first.values[17]) and torch.equal(alone.scale[0], first.scale[17])


def test_more_than_65536_rows():
    (x,) = drawn(70_000, 16)
    rows, y = hk.layer_norm_int8(x, keep=True)
    assert same(rows, hk.quantize_rows(y))


@each_dtype
def test_opcheck(dtype):
    ops = torch.ops.hbert_kernels
    x, r, w, b, taps = drawn(9, 24, dtype, (9, 24), "vector", "vector", (3, 24))
    cu = cu_of([4, 0, 5])
    for activation in (None, 0):
        torch.library.opcheck(ops.quantize_rows.default, (x, activation))
    for keep in (False, True):
        torch.library.opcheck(ops.layer_norm_int8.default, (x, w, b, 1e-5, keep))
        torch.library.opcheck(ops.add_layer_norm_int8.default, (x, r, None, b, 1e-5, keep))
        torch.library.opcheck(ops.conv_layer_norm_int8.default, (x, w, b, taps, cu, 1e-5, keep))
    torch.library.opcheck(ops.activation_layer_norm_int8.default, (x, w, b, 1e-5, 1, b))


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_compiles(backend):
    torch._dynamo.reset()

    def everything(x, r, w, cu):
        rows, y, total = hk.add_layer_norm_int8(x, r, w, keep=True)
        conv, _ = hk.conv_layer_norm_int8(total, w, None, w.repeat(3, 1), cu)
        inner = hk.activation_layer_norm_int8(y, w)
        return rows, y, conv, inner, hk.quantize_rows(total, activation="relu")

    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (9, 17):
        x, r, w = drawn(tokens, 24, F32, (tokens, 24), "vector")
        cu = cu_of([4, tokens - 4])
        for one, other in zip(compiled(x, r, w, cu), everything(x, r, w, cu), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else same(one, other)


CALLS = {
    "quantize_rows": lambda x, w: hk.quantize_rows(x),
    "layer_norm_int8": lambda x, w: hk.layer_norm_int8(x, w),
    "add_layer_norm_int8": lambda x, w: hk.add_layer_norm_int8(x, x, w),
    "activation_layer_norm_int8": lambda x, w: hk.activation_layer_norm_int8(x, w),
    "conv_layer_norm_int8": lambda x, w: hk.conv_layer_norm_int8(x, w, None, w.expand(3, -1), cu_of([len(x)])),
}
each_call = pytest.mark.parametrize(("op", "call"), CALLS.items(), ids=CALLS)


@each_call
def test_a_gradient_is_an_error_and_nothing_else_is(op, call):
    x, w = drawn(4, 8, F32, "vector")
    call(x, w)
    with pytest.raises(RuntimeError, match=f"{op} has no gradient: call it under torch.no_grad"):
        call(x.requires_grad_(), w)
    with torch.inference_mode():
        call(x, w)
    with torch.no_grad():
        call(x, w)
    if op != "quantize_rows":
        with pytest.raises(RuntimeError, match=f"{op} has no gradient"):
            call(x.detach(), w.requires_grad_())


@each_call
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_is_refused(op, call, backend):
    x, w = drawn(4, 8, F32, "vector")
    with hk.use_backend(backend):
        with pytest.raises(TypeError, match=f"{op}: x has dtype torch.float64; allowed: float32, bfloat16"):
            call(x.double(), w.double())
        with pytest.raises(TypeError, match=f"{op}: x has dtype torch.int8"):
            call(x.to(torch.int8), w)
        with pytest.raises(TypeError, match=f"{op}: x must be a torch.Tensor, got list"):
            call(x.tolist(), w)
        with pytest.raises(ValueError, match=rf"{op}: x must be packed tokens \[T, H\]"):
            call(x[None], w)
        if op != "quantize_rows":
            with pytest.raises(ValueError, match=f"{op}: weight has shape"):
                call(x, w[:-1])


def test_what_else_is_refused():
    x, r, w, taps = drawn(4, 8, F32, (4, 9), "vector", (2, 8))
    with pytest.raises(ValueError, match="add_layer_norm_int8: residual has shape"):
        hk.add_layer_norm_int8(x, r)
    with pytest.raises(TypeError, match="add_layer_norm_int8: float64 does not mix"):
        hk.add_layer_norm_int8(x, x.double())
    for call in (hk.quantize_rows, hk.activation_layer_norm_int8):
        with pytest.raises(ValueError, match="unknown activation 'silu'; allowed: gelu"):
            call(x, activation="silu")
    with pytest.raises(ValueError, match=r"conv_layer_norm_int8: conv_weight must be \[k, 8\] with k odd"):
        hk.conv_layer_norm_int8(x, w, None, taps, cu_of([4]))
    with pytest.raises(ValueError, match="conv_layer_norm_int8: cu_seqlens ends at 5"):
        hk.conv_layer_norm_int8(x, w, None, taps[:1], cu_of([5]))


def test_scales_are_float32_whatever_the_default_dtype():
    x = torch.tensor([[1.0, -2.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    expected = quantize_rows_reference(x).scale
    torch.set_default_dtype(F64)
    try:
        scale = quantize_rows_reference(x).scale
    finally:
        torch.set_default_dtype(F32)
    assert scale.dtype == F32
    assert torch.equal(scale[:2], torch.tensor([2 / 127, 0])) and scale[2:].isnan().all()
    torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("quantize_rows", (F64, None), "x must be float32 or bfloat16"),
        ("quantize_rows", (F32, 3), "activation must be 0"),
        ("layer_norm_int8", (F64, None, None, 1e-5, False), "x must be float32 or bfloat16"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(op, arguments, message):
    x = torch.randn(3, 8, dtype=arguments[0])
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        getattr(torch.ops.hbert_kernels, op)(x, *arguments[1:])


def test_every_op_explains_itself():
    assert set(hk.INFERENCE_OPS) == {*CALLS, "int8_linear", "packed_linear"}
    for op in hk.INFERENCE_OPS:
        assert hk.explain(op, torch.randn(2, 8)).startswith(f"{op}: cpp runs")
        assert "triton: no kernel is written for this op" in hk.explain(op)
