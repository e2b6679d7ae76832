"""Reference of attention against the formula."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, formulas
from .checks import BF16, F32, F64, RAGGED, cu_of, randn

pytestmark = pytest.mark.usefixtures("reference")


def bind(function, lengths, heads, longer=0, **options):
    cu, longest = cu_of(lengths), max(lengths, default=0) + longer
    return lambda qkv: function(qkv, cu, longest, heads, **options)


def problem(lengths, width, heads, scale=1.0):
    """The op, its formula and qkv."""
    return (
        bind(hk.attention, lengths, heads),
        bind(formulas.attention, lengths, heads),
        [randn(sum(lengths), 3 * width, scale=scale)],
    )


@pytest.mark.parametrize(("lengths", "width", "heads"), checks.PROBLEMS, ids=str)
def test_exact_in_float64(lengths, width, heads):
    checks.assert_exact(*problem(lengths, width, heads))


def test_a_thousand_tokens():
    checks.assert_exact(*problem([1000], 64, 4))


@pytest.mark.parametrize("lengths", [[37, 0, 129, 1, 2], [64, 64]], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_single_and_half_precision(lengths, dtype):
    checks.assert_within_policy(lambda: problem(lengths, 64, 4), dtype)


def test_one_token_attends_to_itself():
    qkv = randn(1, 3 * 64).float()
    assert torch.equal(hk.attention(qkv, cu_of([1]), 1, 4), qkv[:, 128:])


def test_huge_logits():
    op, formula, inputs = problem([7, 1, 30], 64, 4, scale=60.0)  # 60 * 60 * sqrt(d = 16) / 4 and more
    # A logit of 1e4 has an error of 1e4 eps, which is the relative error of its exponential.
    checks.assert_exact(op, formula, inputs, 1e4 * checks.FLOAT64_BOUND)
    for dtype in (F32, BF16):
        assert all(v.isfinite().all() for v in checks.evaluate(op, [inputs[0].to(dtype)]).values())


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
@pytest.mark.parametrize("longer", [0, 3])
def test_no_tokens(lengths, longer):
    op = bind(hk.attention, lengths, 4, longer)
    checks.assert_zero_gradients(op, [randn(0, 192)], (0, 64))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, [4, 4]], ids=str)
def test_dead_rows_are_inert(lengths, dtype):
    op, _, inputs = problem(lengths, 64, 4)
    checks.assert_dead_rows_are_inert(op, [t.to(dtype) for t in inputs], 1)


def test_equal_lengths_take_the_same_values_as_padding():
    lengths = [7, 7, 7]
    inputs = problem(lengths, 64, 4)[2]
    tight, padded = (bind(hk.attention, lengths, 4, longer) for longer in (0, 5))
    checks.assert_equal_to_rounding(checks.evaluate(tight, inputs), checks.evaluate(padded, inputs))


def test_sequences_do_not_see_each_other():
    op, _, (qkv,) = problem([3, 4, 5], 64, 4)
    clean = op(qkv)
    qkv[3:7] = torch.nan
    assert torch.equal(op(qkv)[[0, 1, 2, 7, 8, 9, 10, 11]], clean[[0, 1, 2, 7, 8, 9, 10, 11]])


def test_dropout():
    qkv = randn(600, 3 * 64)
    qkv[:, 128:] = 1.0  # every output is the sum of the kept weights
    call = bind(hk.attention, [600], 4, dropout_p=0.25)

    def seeded():
        torch.manual_seed(1)
        return call(qkv)

    assert torch.equal(seeded(), seeded())
    assert not torch.equal(call(qkv), call(qkv))
    assert abs(float(seeded().mean()) - 1) < 0.02
    assert torch.equal(bind(hk.attention, [600], 4, dropout_p=0.0)(qkv), bind(hk.attention, [600], 4)(qkv))


def test_strides_do_not_matter():
    op, _, inputs = problem(RAGGED, 64, 4)
    checks.assert_strides_do_not_matter(op, inputs)


def test_gradcheck():
    op, _, inputs = problem([2, 0, 3], 4, 2)
    checks.assert_gradcheck(op, inputs)


def test_compiles():
    def function(qkv, cu, longest):
        return hk.attention(qkv, cu, longest, 4)

    batches = ([3, 4], [2, 0, 9, 30])
    checks.assert_compiles(function, [(problem(b, 64, 4)[2], (cu_of(b), max(b))) for b in batches])


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), heads=st.sampled_from([1, 2, 8])
)
def test_any_lengths(lengths, heads):
    checks.assert_exact(*problem(lengths, 16, heads))
