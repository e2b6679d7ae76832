"""int8_linear and pack_int8_weight: public functions, op, compiled kernel, reference."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import hbert_kernels as hk
from hbert_kernels._accuracy import error_bound, max_error
from hbert_kernels._library import int8_weight_layout
from hbert_kernels.ops.int8_linear import unpack_int8_weight

from .checks import BF16, F32
from .kernel_checks import compiled_kernels as compiled_kernels

# T, K, N
SIZES = [
    (0, 64, 64), (1, 1, 1), (1, 768, 3072), (2, 64, 1000), (3, 5, 17), (4, 63, 65), (5, 1000, 64), (7, 192, 192),
    (13, 3072, 130), (37, 1000, 768), (97, 66, 16), (129, 3072, 192), (129, 768, 1000), (200, 131, 128),
]  # fmt: skip
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def integers(*shape, low=-127, high=128):
    return torch.randint(low, high, shape)


def exact_weight(numbers):
    """A packed weight of integers with these magnitudes, with scales of 1: each row holds 127.

    Neighbours have different signs, so that pairs need no other scale at any level.
    """
    numbers = numbers.clone()
    numbers[:, 0] = 127
    odd = numbers[:, 1::2]
    odd.copy_(torch.where(numbers[:, ::2][:, : odd.shape[1]] > 0, -odd.abs(), odd.abs()))
    packed = hk.pack_int8_weight(numbers.float())
    assert torch.equal(packed.scale, torch.ones(len(numbers)))
    return packed, numbers


def plain_rows(numbers):
    """int8 rows with scales of 1."""
    return hk.Int8Rows(numbers.to(torch.int8), torch.ones(len(numbers)))


def problem(tokens, width, columns):
    """Rows and weight with scales of every size."""
    x = torch.randn(tokens, width) * torch.logspace(-2, 2, tokens)[:, None]
    weight = torch.randn(columns, width) * torch.logspace(-1, 1, columns)[:, None]
    return hk.quantize_rows(x), hk.pack_int8_weight(weight)


def formula(x, weight, bias=None, other=None):
    """In float64: the sum over the inputs, scaled, plus bias and residual."""
    sums = x.values.double() @ unpack_int8_weight(weight).double().t()
    y = sums * x.scale.double()[:, None] * weight.scale.double()
    y = y if bias is None else y + bias.double()
    return y if other is None else y + other.double()


@each_size
def test_sums_are_exact(size):
    tokens, width, columns = size
    x, (weight, numbers) = integers(tokens, width, low=-128), exact_weight(integers(columns, width))
    assert torch.equal(hk.int8_linear(plain_rows(x), weight), (x @ numbers.t()).float())


@pytest.mark.parametrize("width", [2, 4, 7, 768, 3072, 16384, 131072])
@pytest.mark.parametrize("x", [(-128, -128), (127, 127), (-128, 127)])
@pytest.mark.parametrize("w", [(-1, -1), (1, 1), (-1, 1), (1, -1), (1, 0)])
def test_no_sum_saturates(x, w, width):
    """The largest sums that there are: those of two products nearly fill 16 bits, those of 131,072 of them 32."""
    rows, weights = (torch.tensor(pair).repeat(n, width)[:, :width] for n, pair in ((7, x), (70, w)))
    weight = hk.pack_int8_weight(weights.float())
    expected = (rows @ unpack_int8_weight(weight).long().t()).float() * weight.scale
    assert torch.equal(hk.int8_linear(plain_rows(rows), weight), expected)


@pytest.mark.parametrize("out", [F32, BF16], ids=str)
@each_size
def test_accurate_at_odd_sizes(size, out):
    tokens, width, columns = size
    x, weight = problem(*size)
    bias, other = torch.randn(columns), torch.randn(tokens, columns)
    for extra in ((), (bias,), (None, other), (bias, other), (bias.bfloat16(), other.bfloat16())):
        exact = formula(x, weight, *extra)
        with hk.use_backend("reference"):
            plain = hk.int8_linear(x, weight, *extra, out_dtype=out)
        y = hk.int8_linear(x, weight, *extra, out_dtype=out)
        assert y.dtype == plain.dtype == out
        assert y.shape == (tokens, columns)
        # Row by row: their sizes differ by 10,000.
        for one, by_torch, truth in zip(y, plain, exact, strict=True):
            assert max_error(one, truth) <= error_bound(truth, max_error(by_torch, truth), out)


def test_is_the_linear_layer_to_the_steps_of_its_numbers():
    x, weight = torch.randn(37, 768), torch.randn(192, 768) / 28
    packed = hk.pack_int8_weight(weight)
    y = hk.int8_linear(hk.quantize_rows(x), packed)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    # Each product is off by at most half a step of either factor; as independent errors they add up as a root.
    step = torch.tensor([x.abs().amax(1).mean() / 127, packed.scale.mean()]) / 12**0.5
    spread = (768 * ((step[0] * weight.std()) ** 2 + (step[1] * x.std()) ** 2)) ** 0.5
    assert float((y - exact).std()) < 1.2 * float(spread)
    assert float((y - exact).std()) > 0.5 * float(spread)


def test_the_weight_is_quantized_by_its_channels():
    weight = torch.randn(70, 100) * torch.logspace(-3, 3, 70)[:, None]
    weight[3] = 0
    packed = hk.pack_int8_weight(weight)
    numbers = unpack_int8_weight(packed)
    assert (numbers.dtype, tuple(numbers.shape), packed.in_features) == (torch.int8, (70, 100), 100)
    if int8_weight_layout().bounded_pairs:
        magnitudes = [max_of_pairs(row.tolist()) for row in weight]
        torch.testing.assert_close(packed.scale, torch.tensor(magnitudes) / 127)
    else:
        assert torch.equal(packed.scale, weight.abs().amax(1) / 127)
        assert numbers.abs().amax(1).tolist() == [127 if n != 3 else 0 for n in range(70)]
    error = (numbers * packed.scale[:, None] - weight).abs().amax(1)
    assert (error <= 0.5001 * packed.scale).all()
    half = hk.pack_int8_weight(weight.bfloat16())
    assert torch.equal(unpack_int8_weight(half), unpack_int8_weight(hk.pack_int8_weight(weight.bfloat16().float())))
    strided = hk.pack_int8_weight(weight.t().contiguous().t())
    assert torch.equal(strided.data, packed.data)


def max_of_pairs(row):
    """The largest magnitude in a row, and of a sum of those that have the same sign in a pair of neighbours."""
    pairs = [row[start : start + 2] for start in range(0, len(row), 2)]
    return max(abs(sum(x for x in pair if x * sign > 0)) for pair in pairs for sign in (1, -1))


@pytest.mark.parametrize("values", ["normal", "equal", "two", "integers"])
def test_pairs_fit_16_bits_where_they_are_added_there(values):
    weight = {
        "normal": torch.randn(500, 771),
        "equal": torch.full((3, 8), 0.3),
        "two": torch.rand(2000, 2) + 1,  # whichever way they are rounded
        "integers": integers(100, 100).float(),
    }[values]
    numbers = unpack_int8_weight(hk.pack_int8_weight(weight))
    largest = max(map(max_of_pairs, numbers.tolist()))
    assert largest <= 128 if int8_weight_layout().bounded_pairs else largest > 128


def test_the_layout_is_that_of_the_level():
    layout = int8_weight_layout()
    levels = {
        "scalar": (8, 1, 1, False, False),
        "neon_dot": (8, 4, 1, False, False),
        "avx2": (16, 4, 1, True, True),
        "avx2_vnni": (16, 4, 1, True, False),
        "avx512": (64, 4, 1, True, True),
        "avx512_vnni": (64, 4, 1, True, False),
        "avx512_bf16": (64, 4, 1, True, False),
        "avx512_amx": (32, 4, 16, False, False),
    }
    assert levels[hk.cpu_capability()] == layout
    panel, group = layout.panel, layout.group
    numbers = integers(panel + 1, group + 1)
    packed, numbers = exact_weight(numbers)
    assert tuple(packed.data.shape) == (2, max(2, layout.steps), panel, group)
    assert packed.data[0, 1, 3, 0] == numbers[3, group]
    assert packed.data[1, 0, 0, 0] == numbers[panel, 0]
    assert not packed.data[1, :, 1:].any()
    expected = -128 * numbers.sum(1) if layout.offset else torch.zeros(panel + 1)
    assert torch.equal(packed.start.flatten()[: panel + 1], expected.int())


def test_zero_scales_leave_bias_and_residual():
    weight = torch.randn(20, 30)
    weight[4] = 0
    x = torch.randn(5, 30)
    x[2] = 0
    bias, other = torch.randn(20), torch.randn(5, 20)
    y = hk.int8_linear(hk.quantize_rows(x), hk.pack_int8_weight(weight), bias, other)
    assert torch.equal(y[2], bias + other[2])
    assert torch.equal(y[:, 4], bias[4] + other[:, 4])


def test_nan_stays_in_its_row():
    x = torch.randn(9, 30)
    weight = hk.pack_int8_weight(torch.randn(20, 30))
    clean = hk.int8_linear(hk.quantize_rows(x), weight)
    x[5, 7] = torch.nan
    y = hk.int8_linear(hk.quantize_rows(x), weight)
    assert y[5].isnan().all()
    kept = [row for row in range(9) if row != 5]
    assert torch.equal(y[kept], clean[kept])


def test_strides_do_not_matter():
    x, weight = problem(13, 40, 30)
    bias, other = torch.randn(60)[::2], torch.randn(30, 26).t()[::2]
    expected = hk.int8_linear(x, weight, bias.contiguous(), other.contiguous())
    strided = hk.Int8Rows(x.values.t().contiguous().t(), torch.stack([x.scale, x.scale], 1)[:, 0])
    assert not strided.values.is_contiguous()
    assert torch.equal(hk.int8_linear(strided, weight, bias, other), expected)


@pytest.mark.parametrize("width", [768, 3072])
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(width):
    x, weight = problem(301, width, 200)
    bias, other = torch.randn(200), torch.randn(301, 200)
    first = hk.int8_linear(x, weight, bias, other)
    torch.set_num_threads(1)
    assert torch.equal(hk.int8_linear(x, weight, bias, other), first)
    for rows in (slice(17, 18), slice(100, 116), slice(250, 301)):
        alone = hk.int8_linear(hk.Int8Rows(x.values[rows], x.scale[rows]), weight, bias, other[rows])
        assert torch.equal(alone, first[rows])


def test_more_than_65536_rows():
    x, (weight, numbers) = integers(70_000, 8), exact_weight(integers(5, 8))
    assert torch.equal(hk.int8_linear(plain_rows(x), weight), (x @ numbers.t()).float())


def test_the_reference_reads_what_the_kernel_reads():
    size = (37, 100, 30)
    x, (weight, numbers) = integers(37, 100), exact_weight(integers(30, 100))
    assert torch.equal(unpack_int8_weight(weight), numbers.to(torch.int8))
    with hk.use_backend("reference"):
        assert torch.equal(hk.int8_linear(plain_rows(x), weight), (x @ numbers.t()).float()), size


def arguments(**changed):
    x, weight = problem(6, 24, 20)
    given = dict(
        x=x.values, x_scale=x.scale, weight=weight.data, weight_start=weight.start, weight_scale=weight.scale,
        bias=torch.randn(20), other=torch.randn(6, 20), out_dtype=F32,
    )  # fmt: skip
    return given | changed


@pytest.mark.parametrize("out", [F32, BF16], ids=str)
def test_opcheck(out):
    for changed in (dict(), dict(bias=None, other=None), dict(other=torch.randn(6, 20).bfloat16())):
        given = arguments(out_dtype=out, **changed)
        torch.library.opcheck(torch.ops.hbert_kernels.int8_linear.default, tuple(given.values()))


def test_compiles_without_graph_breaks_or_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()
    weight, bias = hk.pack_int8_weight(torch.randn(20, 24)), torch.randn(20)

    def layer(x, other):
        return hk.int8_linear(hk.quantize_rows(x), weight, bias, other, out_dtype=BF16)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 2, 17, 64):  # the first is no other dimension: the compiler would take both for one
        x, other = torch.randn(tokens, 24), torch.randn(tokens, 20)
        assert torch.equal(compiled(x, other), layer(x, other))
    assert counter.frame_count == 1
    x, other = torch.randn(5, 24), torch.randn(5, 20)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x, other), layer(x, other))


def test_a_gradient_is_an_error():
    x, weight = problem(6, 24, 20)
    bias = torch.randn(20, requires_grad=True)
    with pytest.raises(RuntimeError, match="int8_linear has no gradient: call it under torch.no_grad"):
        hk.int8_linear(x, weight, bias)
    with pytest.raises(RuntimeError, match="int8_linear has no gradient"):
        hk.int8_linear(x, weight, None, torch.randn(6, 20, requires_grad=True))
    with torch.no_grad():
        assert not hk.int8_linear(x, weight, bias).requires_grad
    assert not hk.pack_int8_weight(torch.randn(4, 4, requires_grad=True)).scale.requires_grad


INT8, ONES = torch.zeros(6, 24, dtype=torch.int8), torch.ones(6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=(INT8, ONES)), TypeError, "x must be Int8Rows, .* got tuple"),
        (dict(weight=torch.zeros(20, 24)), TypeError, "weight must be from pack_int8_weight, got Tensor"),
        (dict(x=hk.Int8Rows(INT8.float(), ONES)), TypeError, "x.values must be torch.int8, got torch.float32"),
        (dict(x=hk.Int8Rows(INT8, ONES.double())), TypeError, "x.scale must be torch.float32, got torch.float64"),
        (dict(x=hk.Int8Rows(INT8, ONES[1:])), ValueError, r"x.scale has shape \(5,\), expected \(6,\)"),
        (dict(x=hk.Int8Rows(INT8[0], ONES)), ValueError, "x.values must be packed"),
        (dict(x=hk.Int8Rows(INT8[:, 1:], ONES)), ValueError, "x has 23 features, the weight takes 24"),
        (dict(bias=torch.zeros(19)), ValueError, r"bias has shape \(19,\), expected \(20,\)"),
        (dict(bias=torch.zeros(20).double()), TypeError, "float64 does not mix"),
        (dict(other=torch.zeros(5, 20)), ValueError, r"other has shape \(5, 20\), expected \(6, 20\)"),
        (dict(other=torch.zeros(6, 20, device="meta")), ValueError, "other is on meta"),
        (dict(out_dtype=torch.half), TypeError, "out_dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
    ],
    ids=str,
)
def test_what_is_refused(change, error, message, backend):
    x, weight = problem(6, 24, 20)
    with hk.use_backend(backend), pytest.raises(error, match=f"int8_linear: {message}"):
        hk.int8_linear(**dict(x=x, weight=weight) | change)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), TypeError, "weight has dtype torch.float64; allowed"),
        (torch.zeros(3, 4, dtype=torch.int8), TypeError, "weight has dtype torch.int8"),
        (torch.zeros(3), ValueError, r"weight must be \[N, K\]"),
        (torch.zeros(0, 4), ValueError, r"weight must be \[N, K\] with N > 0"),
        (torch.zeros(1, 131_073), ValueError, ".*K <= 131072"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, "weight holds NaN or infinity"),
        (torch.tensor([[1.0, -torch.inf]]), ValueError, "weight holds NaN or infinity"),
    ],
    ids=str,
)
def test_weights_that_are_refused(weight, error, message):
    with pytest.raises(error, match=f"pack_int8_weight: {message}"):
        hk.pack_int8_weight(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(x=a["x"].int()), "x must be int8"),
        (lambda a: dict(x=torch.cat([a["x"]] * 4, 1)), "the weight is not one of 20 x 96"),
        (lambda a: dict(x_scale=a["x_scale"][1:]), r"x_scale must be float32 \[6\]"),
        (lambda a: dict(weight_scale=a["weight_scale"].double()), r"weight_scale must be float32 \[N\]"),
        (lambda a: dict(weight=a["weight"][:, :, :-1].contiguous()), "laid out for another instruction set level"),
        (lambda a: dict(weight=torch.cat([a["weight"]] * 2)), "the weight is not one of 20 x 24"),
        (lambda a: dict(weight=a["weight"].float()), "weight must be contiguous int8"),
        (lambda a: dict(weight_start=a["weight_start"].long()), "start contiguous int32"),
        (lambda a: dict(bias=a["bias"][1:]), "a parameter must have 20 values"),
        (lambda a: dict(bias=a["bias"].double()), "float64 does not mix"),
        (lambda a: dict(other=a["other"][1:]), r"other must be \[6, 20\]"),
        (lambda a: dict(other=a["other"].double()), "other must be float32 or bfloat16"),
        (lambda a: dict(out_dtype=torch.float64), "out_dtype must be float32 or bfloat16"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hbert_kernels.int8_linear(**given | change(given))
