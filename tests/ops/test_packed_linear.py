"""packed_linear and pack_weight: public functions, op, compiled kernel, reference."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import hbert_kernels as hk
from hbert_kernels._accuracy import error_bound, max_error
from hbert_kernels._library import packed_weight_layout
from hbert_kernels.ops.packed_linear import unpack_weight

from .checks import BF16, F32
from .kernel_checks import compiled_kernels as compiled_kernels

# T, K, N
SIZES = [
    (0, 64, 64), (1, 1, 1), (1, 768, 3072), (2, 64, 1000), (3, 5, 17), (4, 63, 65), (5, 1000, 64), (6, 257, 16),
    (7, 192, 192), (13, 3072, 130), (37, 1000, 768), (97, 66, 16), (129, 3072, 192), (129, 768, 1000), (200, 513, 128),
]  # fmt: skip
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
FUNCTIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def problem(tokens, width, columns, dtype=F32):
    """Rows and weight of every size."""
    x = torch.randn(tokens, width) * torch.logspace(-2, 2, tokens)[:, None]
    return x.to(dtype), (torch.randn(columns, width) * torch.logspace(-1, 1, columns)[:, None]).to(dtype)


def formula(x, weight, bias=None, other=None, activation=None):
    """In float64."""
    y = x.double() @ weight.double().t()
    y = y if bias is None else y + bias.double()
    y = FUNCTIONS[activation](y) if activation else y
    return y if other is None else y + other.double()


def check(truth, found, plain):
    assert found.dtype == plain.dtype and found.shape == plain.shape == truth.shape
    assert max_error(found, truth) <= error_bound(truth, max_error(plain, truth), found.dtype)


@each_dtype
@each_size
def test_accurate_at_odd_sizes(size, dtype):
    tokens, _, columns = size
    x, weight = problem(*size, dtype)
    packed, bias, other = hk.pack_weight(weight), torch.randn(columns), torch.randn(tokens, columns).to(dtype)
    for extra in ((), (bias,), (None, other), (bias, other)):
        exact, y = formula(x, weight, *extra), hk.packed_linear(x, packed, *extra)
        with hk.use_backend("reference"):
            plain = hk.packed_linear(x, packed, *extra)
        assert y.shape == (tokens, columns) and y.dtype == dtype
        for row in zip(exact, y, plain, strict=True):  # their sizes differ by 10,000
            check(*row)


@each_dtype
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("size", [(2, 64, 1000), (5, 1000, 65), (37, 257, 768), (129, 768, 1000)], ids=str)
def test_activations(size, activation, dtype):
    tokens, width, columns = size
    x, weight = torch.randn(tokens, width).to(dtype), (torch.randn(columns, width) / width**0.5).to(dtype)
    bias, packed, other = torch.randn(columns).to(dtype), hk.pack_weight(weight), torch.randn(tokens, columns).to(dtype)
    for extra in ((bias,), (bias, other)):
        with hk.use_backend("reference"):
            plain = hk.packed_linear(x, packed, *extra, activation=activation)
        y = hk.packed_linear(x, packed, *extra, activation=activation)
        check(formula(x, weight, *extra, activation=activation), y, plain)


@each_dtype
def test_integers_are_exact(dtype):
    """No rounding at all before the last one, so every number has to be where it belongs."""
    for tokens, width, columns in SIZES:
        x, weight = torch.randint(-8, 9, (tokens, width)), torch.randint(-8, 9, (columns, width))
        bias, other = torch.randint(-99, 99, (columns,)), torch.randint(-99, 99, (tokens, columns))
        packed = hk.pack_weight(weight.to(dtype))
        y = hk.packed_linear(x.to(dtype), packed, bias.to(dtype), other.to(dtype), activation="relu")
        assert torch.equal(y, ((x @ weight.t() + bias).relu() + other).to(dtype))


def test_the_reference_computes_bfloat16_in_float32():
    x, weight = torch.randint(-8, 9, (7, 33)), torch.randint(-8, 9, (10, 33))
    with hk.use_backend("reference"):
        y = hk.packed_linear(x.bfloat16(), hk.pack_weight(weight.bfloat16()))
    assert torch.equal(y, (x @ weight.t()).bfloat16())


def test_the_layout_is_that_of_the_level():
    panel = {"scalar": 8, "neon_dot": 8, "avx2": 16, "avx2_vnni": 16}.get(hk.cpu_capability(), 64)
    assert packed_weight_layout(bfloat16=False) == (panel, 1, 1)
    weight = torch.randn(panel + 1, 5)
    packed = hk.pack_weight(weight)
    assert tuple(packed.data.shape) == (2, 5, panel, 1) and packed[1:] == (panel + 1, 5)
    assert packed.data[0, 4, 3] == weight[3, 4] and packed.data[1, 2, 0] == weight[panel, 2]
    assert not packed.data[1, :, 1:].any() and torch.equal(unpack_weight(packed), weight)
    strided = hk.pack_weight(weight.t().contiguous().t())
    assert torch.equal(strided.data, packed.data)
    weight[0, 0] = 9  # the packed one is a copy
    assert packed.data[0, 0, 0] != 9


def test_the_layout_of_bfloat16_is_one_of_pairs_where_it_is_multiplied_as_such():
    layout, plain = packed_weight_layout(bfloat16=True), packed_weight_layout(bfloat16=False)
    assert layout == {"avx512_bf16": (64, 2, 1), "avx512_amx": (32, 2, 16)}.get(hk.cpu_capability(), plain)
    weight = torch.randn(65, 5).bfloat16()
    packed = hk.pack_weight(weight)
    assert torch.equal(unpack_weight(packed), weight) and packed[1:] == (65, 5)
    pairs = layout.group == 2
    steps = -(-(3 if pairs else 5) // layout.steps) * layout.steps
    assert tuple(packed.data.shape) == (-(-65 // layout.panel), steps, layout.panel, layout.group)
    assert packed.data[0, 1, 7, 1] == weight[7, 3] if pairs else packed.data[0, 3, 7, 0] == weight[7, 3]
    assert not packed.data.transpose(2, 3).flatten(1, 2)[:, 5:].any()


@pytest.mark.parametrize("size", [(3, 64, 96), (40, 1056, 64)], ids=str)
def test_torch_and_our_product_take_turns(size):
    """Both may hold state in registers that outlive a call (AMX)."""
    x, weight = (t.bfloat16() for t in problem(*size))
    packed, bias = hk.pack_weight(weight), torch.zeros(len(weight), dtype=torch.bfloat16)
    theirs, ours = F.linear(x, weight, bias), hk.packed_linear(x, packed)
    for _ in range(3):
        assert torch.equal(F.linear(x, weight, bias), theirs)
        assert torch.equal(hk.packed_linear(x, packed), ours)


@each_dtype
def test_nan_stays_in_its_row(dtype):
    x, weight = torch.randn(9, 300).to(dtype), hk.pack_weight(torch.randn(20, 300).to(dtype))
    clean = hk.packed_linear(x, weight)
    x[5, 7] = torch.nan
    y = hk.packed_linear(x, weight)
    assert y[5].isnan().all()
    kept = [row for row in range(9) if row != 5]
    assert torch.equal(y[kept], clean[kept])


@each_dtype
def test_strides_do_not_matter(dtype):
    x, weight = problem(13, 40, 30, dtype)
    packed, bias, other = hk.pack_weight(weight), torch.randn(60)[::2], torch.randn(30, 26).to(dtype).t()[::2]
    expected = hk.packed_linear(x, packed, bias.contiguous(), other.contiguous())
    assert torch.equal(hk.packed_linear(x.t().contiguous().t(), packed, bias, other), expected)


@each_dtype
@pytest.mark.parametrize("width", [768, 3071, 3072])
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(width, dtype):
    x, weight = problem(301, width, 200, dtype)
    packed, bias, other = hk.pack_weight(weight), torch.randn(200), torch.randn(301, 200).to(dtype)
    first = hk.packed_linear(x, packed, bias, other, activation="gelu")
    torch.set_num_threads(1)
    assert torch.equal(hk.packed_linear(x, packed, bias, other, activation="gelu"), first)
    for rows in (slice(17, 18), slice(100, 116), slice(250, 301)):
        assert torch.equal(hk.packed_linear(x[rows], packed, bias, other[rows], activation="gelu"), first[rows])


def test_more_than_65536_rows():
    x, weight = torch.randint(-9, 9, (70_000, 8)), torch.randint(-9, 9, (5, 8))
    assert torch.equal(hk.packed_linear(x.float(), hk.pack_weight(weight.float())), (x @ weight.t()).float())


def arguments(**changed):
    x, weight = problem(6, 24, 20)
    given = dict(
        x=x, weight=hk.pack_weight(weight).data, columns=20, bias=torch.randn(20), other=torch.randn(6, 20),
        activation=0,
    )  # fmt: skip
    return given | changed


@pytest.mark.parametrize("changed", [dict(), dict(bias=None, other=None, activation=None)], ids=["all", "bare"])
def test_opcheck(changed):
    torch.library.opcheck(torch.ops.hbert_kernels.packed_linear.default, tuple(arguments(**changed).values()))


def test_compiles_without_graph_breaks_or_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()
    weight, bias = hk.pack_weight(torch.randn(20, 24)), torch.randn(20)

    def layer(x, other):
        return hk.packed_linear(x, weight, bias, other, activation="gelu")

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 2, 17, 64):  # the first is no other dimension: the compiler would take both for one
        x, other = torch.randn(tokens, 24), torch.randn(tokens, 20)
        assert torch.equal(compiled(x, other), layer(x, other))
    assert counter.frame_count == 1


def test_autocast_changes_nothing():
    x, weight = problem(6, 24, 20)
    packed = hk.pack_weight(weight)
    for backend in ("cpp", "reference"):
        with hk.use_backend(backend):
            expected = hk.packed_linear(x, packed)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(hk.packed_linear(x, packed), expected)


def test_a_gradient_is_an_error():
    x, weight = problem(6, 24, 20)
    packed = hk.pack_weight(weight.requires_grad_())
    assert not packed.data.requires_grad
    for changed in (dict(x=x.clone().requires_grad_()), dict(bias=torch.randn(20, requires_grad=True))):
        with pytest.raises(RuntimeError, match="packed_linear has no gradient: call it under torch.no_grad"):
            hk.packed_linear(**dict(x=x, weight=packed) | changed)
        with torch.no_grad():
            assert not hk.packed_linear(**dict(x=x, weight=packed) | changed).requires_grad


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=torch.zeros(20, 24)), TypeError, "weight must be from pack_weight, got Tensor"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.zeros(6, 24).bfloat16()), TypeError, "weight has dtype torch.float32, but x has torch.bfloat16"),
        (dict(x=torch.zeros(6, 24).double()), TypeError, "float64 does not mix"),
        (dict(x=torch.zeros(24)), ValueError, "x must be packed"),
        (dict(x=torch.zeros(6, 23)), ValueError, "x has 23 features, the weight takes 24"),
        (dict(bias=torch.zeros(19)), ValueError, r"bias has shape \(19,\), expected \(20,\)"),
        (dict(bias=torch.zeros(20).double()), TypeError, "float64 does not mix"),
        (dict(other=torch.zeros(6, 20).bfloat16()), TypeError, "other has dtype torch.bfloat16, but x"),
        (dict(other=torch.zeros(5, 20)), ValueError, r"other has shape \(5, 20\), expected \(6, 20\)"),
        (dict(other=torch.zeros(6, 20, device="meta")), ValueError, "other is on meta"),
        (dict(activation="silu"), ValueError, "unknown activation 'silu'"),
    ],
    ids=str,
)
def test_what_is_refused(change, error, message, backend):
    x, weight = problem(6, 24, 20)
    with hk.use_backend(backend), pytest.raises(error, match=message):
        hk.packed_linear(**dict(x=x, weight=hk.pack_weight(weight)) | change)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), TypeError, "weight has dtype torch.float64; allowed"),
        (torch.zeros(3), ValueError, r"weight must be \[N, K\]"),
        (torch.zeros(0, 4), ValueError, r"weight must be \[N, K\] with N, K > 0"),
        (torch.zeros(4, 0), ValueError, r"weight must be \[N, K\] with N, K > 0"),
    ],
    ids=str,
)
def test_weights_that_are_refused(weight, error, message):
    with pytest.raises(error, match=f"pack_weight: {message}"):
        hk.pack_weight(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(x=a["x"].double()), "x must be float32 or bfloat16"),
        (lambda a: dict(x=a["x"][:, :-4]), "the weight is not one of 20 x 20"),
        (lambda a: dict(columns=1000), "the weight is not one of 1000 x 24"),
        (lambda a: dict(weight=a["weight"][:, :, :-1].contiguous()), "laid out for another instruction set level"),
        (lambda a: dict(weight=a["weight"].transpose(1, 2)), "weight must be contiguous"),
        (lambda a: dict(weight=a["weight"].double()), "weight must be contiguous"),
        (lambda a: dict(bias=a["bias"][1:]), r"bias must be float32 \[20\]"),
        (lambda a: dict(bias=a["bias"].double()), r"bias must be float32 \[20\]"),
        (lambda a: dict(other=a["other"][1:]), r"other must be \[6, 20\]"),
        (lambda a: dict(other=a["other"].double()), "other must have the dtype of x"),
        (lambda a: dict(activation=3), "activation must be 0"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hbert_kernels.packed_linear(**given | change(given))
