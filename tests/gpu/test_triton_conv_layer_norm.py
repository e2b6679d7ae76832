"""Triton's conv_layer_norm in the interpreter: numbers by the policy, properties, plans, launches and bytes."""

import pytest
import torch
import triton_ops
from ops import checks, formulas, kernel_checks
from ops.checks import BF16, F32, RAGGED, cu_of, randn
from triton_ops import assert_accurate

from hbert_kernels.triton import _common, limits
from hbert_kernels.triton import conv_layer_norm as conv

F16 = torch.float16
each_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


def bind(module, cu):
    return lambda x, taps, weight, bias: module.conv_layer_norm(x, weight, bias, taps, cu)


def problem(taps, lengths, width, mean=0.0):
    """The op, its formula and x, taps, weight, bias in float64."""
    cu = cu_of(lengths)
    inputs = [randn(sum(lengths), width) * 2 + mean, randn(taps, width), *checks.affine(width)]
    return bind(triton_ops, cu), bind(formulas, cu), inputs


@each_dtype
@pytest.mark.parametrize(
    ("taps", "lengths", "width"),
    [(3, [1], 64), (3, [7], 1000), (3, [37, 2], 192), (5, [60, 1, 9], 64), (1, RAGGED, 24), (3, RAGGED, 24)],
    ids=str,
)
def test_accurate_at_odd_sizes(taps, lengths, width, dtype):
    assert_accurate(*problem(taps, lengths, width), dtype)


@pytest.mark.parametrize("taps", [5, 7, 9])
def test_any_number_of_taps_even_beyond_the_sequence(taps):
    assert_accurate(*problem(taps, [2, 19, 0, 3], 40), F32)


@pytest.mark.parametrize(("dtype", "parameter"), [(BF16, F32), (F16, F32), (F32, BF16)], ids=str)
def test_parameters_of_another_dtype(dtype, parameter):
    assert_accurate(*problem(3, [30, 7], 100), dtype, parameter)


@pytest.mark.parametrize("present", ["", "weight", "bias"])
def test_parameters_are_optional(present):
    cu, (x, taps, *affine) = cu_of([17, 5]), problem(3, [17, 5], 40)[2]

    def without(module):
        def op(x, taps, parameter=None):
            weight, bias = {"": (None, None), "weight": (parameter, None), "bias": (None, parameter)}[present]
            return module.conv_layer_norm(x, weight, bias, taps, cu)

        return op

    given = [t for t, name in zip(affine, ("weight", "bias"), strict=True) if name == present]
    assert_accurate(without(triton_ops), without(formulas), [x, taps, *given], F32)


def test_large_means_do_not_cancel():
    op, formula, inputs = problem(3, [20, 7], 192, mean=1e4)
    inputs = [t.float() for t in inputs]
    # The error of the problem, see the test of the same name of the row norms; three taps of about 1 add it up.
    bound = 3 * 2 * torch.finfo(F32).eps * 1e4 / 2
    expected = checks.evaluate(formula, [t.double() for t in inputs])
    checks.assert_equal_to_rounding(checks.evaluate(op, inputs), expected, bound)


def test_taps_of_zero_leave_the_norm():
    x, taps, *affine = (t.float() for t in problem(5, [5, 30], 40)[2])
    y = triton_ops.conv_layer_norm(x, *affine, torch.zeros_like(taps), cu_of([5, 30]))
    assert torch.equal(y, triton_ops.layer_norm(x, *affine))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths):
    op, _, inputs = problem(3, lengths, 64)
    checks.assert_zero_gradients(op, [t.float() for t in inputs], (0, 64))


@pytest.mark.parametrize(("taps", "dtype"), [(1, F32), (3, BF16), (5, F32)], ids=str)
def test_dead_rows_are_inert(taps, dtype):
    op, _, inputs = problem(taps, RAGGED, 24)
    inputs = [t.to(dtype) for t in inputs]
    checks.assert_dead_rows_are_inert(op, inputs, 1)
    triton_ops.assert_dead_rows_are_not_read(op, inputs, dead=40)


def test_only_dead_rows():
    op, _, (_, *rest) = problem(3, [0, 0], 24)
    checks.assert_zero_gradients(op, [torch.full((3, 24), torch.nan), *[t.float() for t in rest]], (3, 24))


def test_statistics_are_those_of_the_rows_and_zero_behind_them():
    x = torch.randn(23, 24)
    _, mean, rstd = conv.conv_layer_norm(x, None, None, torch.randn(3, 24), cu_of([11, 9]), 1e-5)
    exact = x[:20].double()
    torch.testing.assert_close(mean[:20].double(), exact.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rstd[:20].double(), (exact.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert not mean[20:].any() and not rstd[20:].any()


def test_strides_do_not_matter():
    op, _, inputs = problem(3, RAGGED, 40)
    checks.assert_strides_do_not_matter(op, [t.float() for t in inputs])


def test_neighbours_change_no_bit_of_a_sequence():
    lengths = [30, 0, 7, 17]
    x, *shared = (t.float() for t in problem(3, lengths, 96)[2])
    kernel_checks.assert_neighbours_change_no_bit(lambda n: bind(triton_ops, cu_of(n)), lengths, [x], (), shared)


@pytest.mark.parametrize(("row", "reached"), [(14, slice(12, 17)), (18, slice(16, 19))])
def test_nan_reaches_as_far_as_the_taps_in_its_sequence(row, reached):
    op, _, inputs = problem(5, [10, 9, 12], 40)
    kernel_checks.assert_nan_stays(op, [t.float() for t in inputs], row, reached, slice(row, row + 1))


@pytest.mark.parametrize("lengths", [[1] * 20 + [0] * 9 + [2, 30], [90]], ids=["short", "long"])
def test_several_slots_per_lane(lengths, monkeypatch):
    monkeypatch.setattr(conv, "MAX_PARTS", 1)
    monkeypatch.setattr(conv, "tile_of", lambda *_, **__: _common.Tile(2, 8, 1))
    assert conv.backward_plan(sum(lengths), len(lengths), 8, 3).group > 1
    assert_accurate(*problem(3, lengths, 8), F32)


def test_plans_fit_the_shape():
    assert conv.forward_plan(2**18, 512, 768, 3) == _common.Plan(_common.Tile(2, 1024, 8), 128, 1, 1281)
    assert conv.forward_plan(1024, 8, 768, 3) == _common.Plan(_common.Tile(2, 1024, 8), 8, 1, 69)
    assert conv.backward_plan(2**18, 512, 768, 3) == _common.Plan(_common.Tile(1, 1024, 4), 128, 6, 427)
    assert conv.backward_plan(1024, 8, 768, 7).tile == _common.Tile(1, 1024, 8)


@pytest.mark.parametrize("plan", [conv.forward_plan, conv.backward_plan])
@pytest.mark.parametrize("width", [1, 64, 768, 4096])
@pytest.mark.parametrize("num_rows", [0, 1, 5000, 10**6])
@pytest.mark.parametrize("num_seqs", [0, 1, 1000])
def test_programs_cover_all_slots(plan, width, num_rows, num_seqs):
    p = plan(num_rows, num_seqs, width, 3)
    assert p.programs * p.group * p.tile.rows >= _common.slots_of(num_rows, num_seqs, p.chunk)
    assert p.tile.cols >= width
    assert plan is conv.forward_plan or p.programs <= _common.MAX_PARTS


def test_what_does_not_fit_is_refused():
    assert limits.ring_refusal(4096, 5) is None
    assert limits.ring_refusal(768, 19) is None
    assert "got 4097 and 3" in limits.ring_refusal(4097, 3)
    assert "got 768 and 21" in limits.ring_refusal(768, 21)


@pytest.mark.parametrize(("taps", "dtype"), [(3, F32), (3, BF16), (5, BF16)], ids=str)
def test_a_forward_is_one_launch_and_moves_each_byte_once(taps, dtype, launches, monkeypatch):
    # The chunks of a large batch, which decide how many rows are read twice, on fewer programs.
    chunk = conv.forward_plan(2**18, 512, 192, taps).chunk
    monkeypatch.setattr(conv, "_chunk_of", lambda *_, **__: chunk)
    cu, (x, conv_weight, *affine) = cu_of([512, 512]), (t.to(dtype) for t in problem(taps, [512, 512], 192)[2])
    results = conv.conv_layer_norm(x, *affine, conv_weight, cu, 1e-5)
    (launch,) = launches
    assert launch.bytes["Y"] == x.nbytes
    assert launches.total_bytes <= 1.05 * triton_ops.sizes(x, conv_weight, *affine, cu, *results)


@pytest.mark.parametrize(("taps", "length"), [(3, 1), (3, 128), (5, 128)])
def test_a_backward_is_two_launches_and_moves_at_most_twice_the_bytes(taps, length, launches):
    cu, inputs = cu_of([length] * (128 // length)), [t.bfloat16() for t in problem(taps, [128], 192)[2]]
    x, conv_weight, *affine = inputs
    arguments = x.clone(), x, *torch.zeros(2, len(x)), *affine, conv_weight, cu
    results = conv.conv_layer_norm_backward(*arguments)
    assert [launch.kernel for launch in launches] == ["conv_norm_backward", "sum_parts"]
    assert launches[0].bytes["X"] == launches[0].bytes["DX"] == x.nbytes
    assert launches.total_bytes <= 2 * triton_ops.sizes(*arguments, *results)
