"""Triton layer norms in the interpreter: numbers by the policy, properties, plans, launches and bytes."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
import triton_ops
from ops import checks, formulas, kernel_checks
from ops.checks import BF16, F32, RAGGED, cu_of, randn
from triton_ops import assert_accurate

from hbert_kernels.triton import _common, limits, row_norm

F16 = torch.float16
each_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
ROW_OPS = {
    "layer_norm": (triton_ops.layer_norm, formulas.layer_norm, 1, 0),
    "add_layer_norm": (triton_ops.add_layer_norm, formulas.add_layer_norm, 2, 0),
    **{
        name: (
            lambda x, w, b, c, name=name: triton_ops.activation_layer_norm(x, w, b, activation=name, input_bias=c),
            lambda x, w, b, c, name=name: formulas.activation_layer_norm(x, w, b, activation=name, input_bias=c),
            1,
            1,
        )
        for name in triton_ops.ACTIVATIONS
    },
}
each_row_op = pytest.mark.parametrize("name", ROW_OPS)


def of_rows(name, rows, width, mean=0.0):
    """The op, its formula and its inputs in float64."""
    op, formula, activations, extra = ROW_OPS[name]
    inputs = [randn(rows, width) * 2 + mean for _ in range(activations)]
    return op, formula, [*inputs, *checks.affine(width), *(randn(width) for _ in range(extra))]


def gated(lengths, width, mean=0.0):
    """As :func:`of_rows`, for the packed norm."""
    cu = cu_of(lengths)
    inputs = [randn(sum(lengths), width) * 2 + mean, randn(len(lengths), width), *checks.affine(width)]
    return bind(triton_ops, cu), bind(formulas, cu), inputs


def bind(module, cu):
    return lambda x, gate, weight, bias: module.gated_layer_norm(x, gate, cu, weight, bias)


@each_row_op
@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 1000), (130, 5)])
def test_accurate_at_odd_sizes(rows, width, dtype, name):
    assert_accurate(*of_rows(name, rows, width), dtype, activations=ROW_OPS[name][2])


@each_dtype
@pytest.mark.parametrize(("lengths", "width"), [([1], 64), ([37, 2], 768), ([129, 1, 30], 64), (RAGGED, 192)], ids=str)
def test_gated_accurate_at_odd_sizes(lengths, width, dtype):
    assert_accurate(*gated(lengths, width), dtype)


@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
@pytest.mark.parametrize(("dtype", "parameter"), [(BF16, F32), (F16, F32), (F32, BF16)], ids=str)
def test_parameters_of_another_dtype(name, dtype, parameter):
    assert_accurate(*of_rows(name, 37, 100), dtype, parameter)
    assert_accurate(*gated([30, 7], 100), dtype, parameter)


@pytest.mark.parametrize(("x", "residual"), [(BF16, F32), (F32, BF16), (F16, F32), (F16, BF16)], ids=str)
def test_residual_stream_of_another_dtype(x, residual):
    branch, stream, weight, bias = of_rows("add_layer_norm", 37, 200)[2]
    inputs = [branch.to(x), stream.to(residual), weight.float(), bias.float()]
    actual, plain = (checks.evaluate(op, inputs) for op in ROW_OPS["add_layer_norm"][:2])
    exact = checks.evaluate(formulas.add_layer_norm, [t.double() for t in inputs])
    for key, value in actual.items():
        assert value.dtype == plain[key].dtype, key
        rows = 37 if key in ("gradient 2", "gradient 3") else 1
        bound = checks.error_bound(exact[key], checks.max_error(plain[key], exact[key]), value.dtype, rows)
        assert checks.max_error(value, exact[key]) <= bound, key
    assert torch.equal(actual["output 1"], inputs[0] + inputs[1])


@pytest.mark.parametrize("present", [(), ("weight",), ("bias",)], ids=str)
def test_parameters_are_optional(present):
    def without(op):
        def call(*leaves):
            tensors, given = leaves[: len(leaves) - len(present)], dict(zip(present, leaves[-1:], strict=False))
            return op(*tensors, **given)

        return call

    cu, affine = cu_of([30, 7]), dict(zip(("weight", "bias"), checks.affine(40), strict=True))
    given = [affine[name] for name in present]
    for name, tensors, options in (
        ("layer_norm", [randn(37, 40)], {}),
        ("add_layer_norm", [randn(37, 40), randn(37, 40)], {}),
        ("activation_layer_norm", [randn(37, 40)], {}),
        ("gated_layer_norm", [randn(37, 40), randn(2, 40)], {"cu_seqlens": cu}),
    ):
        pair = [without(partial(getattr(module, name), **options)) for module in (triton_ops, formulas)]
        assert_accurate(*pair, [*tensors, *given], F32, activations=len(tensors))


@each_row_op
def test_large_means_do_not_cancel(name):
    op, formula, inputs = of_rows(name, 20, 192, mean=1e4)
    inputs = [t.float() for t in inputs]
    # An ulp of the mean over the deviation (2): the problem's own error. E[x^2] - E[x]^2 would lose its square.
    bound = 2 * torch.finfo(F32).eps * 1e4 / 2
    expected = checks.evaluate(formula, [t.double() for t in inputs])
    checks.assert_equal_to_rounding(checks.evaluate(op, inputs), expected, bound)


def test_eps_is_added_to_the_variance():
    op, formula = (partial(module.layer_norm, eps=0.5) for module in (triton_ops, formulas))
    assert_accurate(op, formula, [randn(7, 40) * 1e-2, *checks.affine(40)], F32)


@pytest.mark.parametrize("name", triton_ops.ACTIVATIONS)
def test_an_inactive_row_gives_the_bias(name):
    op, _, inputs = of_rows(name, 7, 64, mean=-1e4)
    values = checks.evaluate(op, [t.float() for t in inputs])
    assert torch.equal(values["output 0"], inputs[2].float().expand(7, 64))
    assert all(not values[f"gradient {i}"].any() for i in (0, 1, 3))


@each_row_op
def test_no_rows(name):
    op, _, inputs = of_rows(name, 0, 64)
    checks.assert_zero_gradients(op, [t.float() for t in inputs], *[(0, 64)] * ROW_OPS[name][2])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_gated_no_tokens(lengths):
    op, _, inputs = gated(lengths, 64)
    checks.assert_zero_gradients(op, [t.float() for t in inputs], (0, 64))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gated_dead_rows_are_inert(dtype):
    op, _, inputs = gated(RAGGED, 24)
    inputs = [t.to(dtype) for t in inputs]
    checks.assert_dead_rows_are_inert(op, inputs, 1)
    triton_ops.assert_dead_rows_are_not_read(op, inputs, dead=40)


def test_gated_only_dead_rows():
    op, _, (_, *rest) = gated([0, 0], 24)
    checks.assert_zero_gradients(op, [torch.full((3, 24), torch.nan), *[t.float() for t in rest]], (3, 24))


def test_statistics_of_dead_rows_are_zero():
    x, gate = torch.full((5, 24), torch.nan), torch.ones(1, 24)
    x[:2] = 1.0
    y, mean, rstd = row_norm.gated_layer_norm(x, gate, cu_of([2]), None, None, 1e-5)
    assert not any(t[2:].any() for t in (y, mean, rstd))
    assert mean[:2].tolist() == [1.0, 1.0]


def test_strides_do_not_matter():
    for op, _, inputs in (*(of_rows(name, 7, 40) for name in ROW_OPS), gated([5, 0, 2], 40)):
        checks.assert_strides_do_not_matter(op, [t.float() for t in inputs])


@each_row_op
def test_neighbours_change_no_bit_of_a_row(name):
    op, _, inputs = of_rows(name, 67, 192)
    activations = ROW_OPS[name][2]
    inputs = [t.float() for t in inputs]
    many = checks.evaluate(op, inputs)
    alone = checks.evaluate(op, [*(t[17:18] for t in inputs[:activations]), *inputs[activations:]])
    assert torch.equal(alone["output 0"][0], many["output 0"][17])


def test_neighbours_change_no_bit_of_a_sequence():
    lengths = [30, 50, 0, 7]
    x, gate, *affine = (t.float() for t in gated(lengths, 96)[2])
    kernel_checks.assert_neighbours_change_no_bit(lambda n: bind(triton_ops, cu_of(n)), lengths, [x], [gate], affine)


@each_row_op
def test_nan_stays_in_its_row(name):
    op, _, inputs = of_rows(name, 9, 40)
    single = op if ROW_OPS[name][2] == 1 else lambda *tensors: op(*tensors)[0]
    kernel_checks.assert_nan_stays(single, [t.float() for t in inputs], 4, slice(4, 5), slice(4, 5))


@pytest.mark.parametrize("lengths", [[1] * 9 + [0] * 9 + [2, 30], [90]], ids=["short", "long"])
def test_gated_with_several_slots_per_program(lengths, monkeypatch):
    monkeypatch.setattr(row_norm, "MAX_PARTS", 4)
    assert row_norm.backward_plan(sum(lengths), len(lengths), 8).group > 1
    assert_accurate(*gated(lengths, 8), F32)


@triton.jit
def describe_slots(CU, OUT, num_rows, num_seqs, search_steps, chunk, slots, BLOCK: tl.constexpr):
    slot = tl.arange(0, BLOCK)
    seq, piece, first, end = _common.chunk_of_slot(CU, slot, num_rows, num_seqs, search_steps, chunk)
    place = row_norm._gate_part(first, piece, chunk).to(tl.int32)
    tl.store(OUT + slot, seq, mask=slot < slots)
    tl.store(OUT + slots + slot, first, mask=slot < slots)
    tl.store(OUT + 2 * slots + slot, end, mask=slot < slots)
    tl.store(OUT + 3 * slots + slot, place, mask=slot < slots)


@hypothesis.settings(max_examples=30)
@hypothesis.given(lengths=st.lists(st.integers(0, 40), max_size=9), dead=st.integers(0, 9), chunk=st.integers(1, 16))
def test_slots_are_the_chunks_of_every_sequence(lengths, dead, chunk):
    num_rows, num_seqs, cu = sum(lengths) + dead, len(lengths), cu_of(lengths)
    slots = _common.slots_of(num_rows, num_seqs, chunk)
    out = torch.empty(4, slots, dtype=torch.int32)
    sizes = num_rows, num_seqs, _common.search_steps(num_seqs), chunk, slots
    describe_slots[(1,)](cu, out, *sizes, BLOCK=triton.next_power_of_2(slots))
    chunks = [(seq, first, end, place) for seq, first, end, place in out.T.tolist() if first < end]
    expected, starts = [], [*cu.tolist(), num_rows]
    for seq, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        expected += [(seq, first, min(first + chunk, stop)) for first in range(start, stop, chunk)]
    assert [c[:3] for c in chunks] == expected
    assert set(range(num_seqs + 1)) == set(out[0].tolist())
    places = [place for seq, _, _, place in chunks if seq < num_seqs and lengths[seq] > chunk]
    assert len(set(places)) == len(places)
    assert all(0 <= place < 2 * (num_rows // chunk + 1) for place in places)


def test_the_narrowest_and_the_widest_rows():
    assert_accurate(*of_rows("layer_norm", 3, 1), F32)
    x, weight, bias = randn(2, 8192), *checks.affine(8192)
    y, _, _ = row_norm.layer_norm(x.float(), weight.float(), bias.float(), 1e-5)
    checks.assert_equal_to_rounding({"y": y}, {"y": formulas.layer_norm(x, weight, bias)}, 4 * torch.finfo(F32).eps)
    assert limits.width_refusal(8192) is None


def test_wider_rows_are_refused():
    assert limits.width_refusal(8193) == "rows are at most 8192 wide, got 8193"


def test_plans_fit_the_shape():
    assert row_norm.forward_plan(4096, None, 768) == _common.Plan(_common.Tile(1, 1024, 4), 2, 1, 2048)
    assert row_norm.forward_plan(2**17, None, 768).chunk == 64
    assert row_norm.backward_plan(2**17, None, 768) == _common.Plan(_common.Tile(1, 1024, 4), 256, 1, 512)
    assert row_norm.backward_plan(100, None, 768).programs == 13
    assert row_norm.forward_plan(64, 8, 64).tile == _common.Tile(16, 64, 4)
    assert row_norm.backward_plan(64, 8, 64).tile == _common.Tile(16, 64, 4)


@pytest.mark.parametrize("plan", [row_norm.forward_plan, row_norm.backward_plan])
@pytest.mark.parametrize("width", [1, 64, 768, 1000, 8192])
@pytest.mark.parametrize("num_rows", [0, 1, 100, 5000, 10**6])
@pytest.mark.parametrize("num_seqs", [None, 0, 1, 1000])
def test_programs_cover_all_rows(plan, width, num_rows, num_seqs):
    p = plan(num_rows, num_seqs, width)
    slots = p.programs * p.group
    assert slots * p.chunk >= num_rows if num_seqs is None else slots >= _common.slots_of(num_rows, num_seqs, p.chunk)
    assert p.tile.cols >= width > p.tile.cols // 2
    assert p.tile.rows * p.tile.cols <= 8192 and 1 <= p.tile.num_warps <= 16
    assert plan is row_norm.forward_plan or p.programs <= _common.MAX_PARTS


SOURCES = {
    "plain": lambda x, gate, cu, affine: ("layer_norm", [x, *affine, 1e-5]),
    "residual": lambda x, gate, cu, affine: ("add_layer_norm", [x, x.clone(), *affine, 1e-5]),
    "activation": lambda x, gate, cu, affine: ("activation_layer_norm", [x, *affine, 1e-5, 1, affine[0]]),
    "gated": lambda x, gate, cu, affine: ("gated_layer_norm", [x, gate, cu, *affine, 1e-5]),
}


def batch(seqs, length, width, dtype):
    """x, gate, cu_seqlens, and the affine parameters."""
    x, gate = torch.randn(seqs * length, width).to(dtype), torch.randn(seqs, width)
    return x, gate, cu_of([length] * seqs), [torch.randn(width).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_forward_is_one_launch_and_moves_each_byte_once(dtype, source, launches, monkeypatch):
    # The rows per program of a large batch, which decide about the share of the parameters, on fewer programs.
    chunk = row_norm.forward_plan(2**17, 256, 192).chunk
    monkeypatch.setattr(row_norm, "rows_of_program", lambda *_: chunk)
    name, arguments = SOURCES[source](*batch(3, 512, 192, dtype))
    results = getattr(row_norm, name)(*arguments)
    (launch,) = launches
    assert launch.bytes["X"] == arguments[0].nbytes
    assert launches.total_bytes <= 1.05 * triton_ops.sizes(*arguments, *results)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("length", [1, 64])
def test_a_backward_is_few_launches_and_moves_at_most_twice_the_bytes(length, source, launches):
    x, gate, cu, affine = batch(64 // length, length, 192, BF16)
    dy, (mean, rstd) = x.clone(), torch.zeros(2, len(x))
    saved = [x, mean, rstd, *affine]
    name, arguments = {
        "plain": ("layer_norm", [dy, None, *saved]),
        "residual": ("layer_norm", [dy, dy.clone(), *saved]),
        "activation": ("activation_layer_norm", [dy, *saved, 1, affine[0]]),
        "gated": ("gated_layer_norm", [dy, x, gate, cu, mean, rstd, *affine]),
    }[source]
    results = getattr(row_norm, f"{name}_backward")(*arguments)
    assert len(launches) == (3 if source == "gated" else 2)
    assert launches[0].bytes["DY"] == launches[0].bytes["DX"] == dy.nbytes
    assert launches.total_bytes <= 2 * triton_ops.sizes(*arguments, *results)
