"""Reference of additive_pool against the formula: every scorer with every output."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, formulas
from .checks import BF16, F32, RAGGED, cu_of, randn

pytestmark = pytest.mark.usefixtures("reference")
each_scorer = pytest.mark.parametrize("scorer", ["dense", "per_sequence", "per_head"])
each_output = pytest.mark.parametrize("output", ["slice", "full"])


def bind(function, lengths, heads, output, longer=0):
    cu, longest = cu_of(lengths), max(lengths, default=0) + longer
    return lambda x, scorer: function(x, scorer, cu, longest, heads, output=output)


def problem(lengths, width, heads, scorer, output, logits=1.0):
    """The op, its formula and the inputs x, scorer; the logits of a token are about ``logits``."""
    columns = width // heads if scorer == "per_head" else width
    shape = (len(lengths), heads, width) if scorer == "per_sequence" else (heads, columns)
    inputs = [randn(sum(lengths), width), randn(*shape, scale=logits * (width / heads / columns) ** 0.5)]
    return *(bind(function, lengths, heads, output) for function in (hk.additive_pool, formulas.additive_pool)), inputs


@each_output
@each_scorer
@pytest.mark.parametrize(("lengths", "width", "heads"), checks.PROBLEMS, ids=str)
def test_exact_in_float64(lengths, width, heads, scorer, output):
    checks.assert_exact(*problem(lengths, width, heads, scorer, output))


@each_output
@each_scorer
@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_single_and_half_precision(scorer, output, dtype, parameter):
    checks.assert_within_policy(lambda: problem([37, 0, 129, 1, 2], 64, 4, scorer, output), dtype, parameter)
    op, _, inputs = problem([3], 64, 4, scorer, output)
    assert op(*[t.to(dtype) for t in inputs]).dtype == F32


def test_a_thousand_tokens():
    checks.assert_exact(*problem([1000], 64, 4, "dense", "slice"))
    checks.assert_within_policy(lambda: problem([1000], 64, 4, "dense", "slice"), F32)


@each_scorer
def test_one_head(scorer):
    checks.assert_exact(*problem(RAGGED, 24, 1, scorer, "full"))


def test_one_token_pools_to_itself():
    x = randn(1, 64).float()
    actual = hk.additive_pool(x, randn(4, 64).float(), cu_of([1]), 1, 4)
    assert torch.equal(actual, x)


@each_scorer
def test_huge_logits(scorer):
    op, formula, inputs = problem([7, 1, 30], 64, 4, scorer, "slice", logits=1e4)
    # A logit of 1e4 has an error of 1e4 eps, which is the relative error of its exponential.
    checks.assert_exact(op, formula, inputs, 1e4 * checks.FLOAT64_BOUND)
    single = [t.float() for t in inputs]
    assert all(value.isfinite().all() for value in checks.evaluate(op, single).values())


def test_large_means():
    op, formula, (x, scorer) = problem([20, 17], 64, 4, "dense", "slice")
    # A mean of 1e4 makes logits of 1e4, whose errors are the relative errors of their exponentials.
    outputs = [{"pooled": function(x + 1e4, scorer)} for function in (op, formula)]
    checks.assert_equal_to_rounding(*outputs, 1e4 * checks.FLOAT64_BOUND)


@each_output
def test_an_empty_sequence_pools_to_zeros(output):
    op, _, (x, scorer) = problem(RAGGED, 64, 4, "dense", output)
    pooled = op(x, scorer)
    for b, length in enumerate(RAGGED):
        assert bool(pooled[b].any()) == (length > 0)


@each_output
@each_scorer
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths, scorer, output):
    op, _, inputs = problem(lengths, 64, 4, scorer, output)
    batch = len(lengths)
    checks.assert_zero_gradients(op, inputs, (batch, 64) if output == "slice" else (batch, 4, 64))


@each_output
@each_scorer
def test_dead_rows_are_inert(scorer, output):
    op, _, inputs = problem(RAGGED, 64, 4, scorer, output)
    checks.assert_dead_rows_are_inert(op, inputs, 1)


@each_scorer
def test_equal_lengths_take_the_same_values_as_padding(scorer):
    lengths = [7, 7, 7]
    _, _, inputs = problem(lengths, 64, 4, scorer, "slice")
    tight, padded = (bind(hk.additive_pool, lengths, 4, "slice", longer) for longer in (0, 5))
    checks.assert_equal_to_rounding(checks.evaluate(tight, inputs), checks.evaluate(padded, inputs))


@each_output
@each_scorer
@pytest.mark.parametrize("place", [0, 2, 3])
def test_neighbours_change_nothing_but_rounding(scorer, output, place):
    """Sequences are padded to the longest, and how torch sums depends on that length (MKL on Intel's processors)."""
    lengths = [3, 40, 21, 9]
    op, _, inputs = problem(lengths, 64, 4, scorer, output)
    x, vectors = (t.double() for t in inputs)
    rows = formulas.sequences(cu_of(lengths))[place]
    own = vectors[place : place + 1] if scorer == "per_sequence" else vectors
    alone = bind(hk.additive_pool, lengths[place : place + 1], 4, output)(x[rows], own)
    many = op(x, vectors)[place]
    checks.assert_equal_to_rounding({"y": alone[0]}, {"y": many})


@each_scorer
def test_nan_stays_in_its_sequence(scorer):
    op, _, (x, vectors) = problem([3, 4, 5], 64, 4, scorer, "slice")
    clean = op(x, vectors)
    x[4] = torch.nan
    assert torch.equal(op(x, vectors)[[0, 2]], clean[[0, 2]])


@each_scorer
def test_strides_do_not_matter(scorer):
    op, _, inputs = problem(RAGGED, 64, 4, scorer, "full")
    checks.assert_strides_do_not_matter(op, inputs)


@each_output
@each_scorer
def test_gradcheck(scorer, output):
    op, _, inputs = problem([2, 0, 3], 4, 2, scorer, output)
    checks.assert_gradcheck(op, inputs)


@pytest.mark.parametrize(("scorer", "output"), [("per_sequence", "full"), ("per_head", "slice")])
def test_compiles(scorer, output):
    def function(x, vectors, cu, longest):
        return hk.additive_pool(x, vectors, cu, longest, 4, output=output)

    batches = ([3, 4], [2, 0, 9, 30])
    calls = [(problem(b, 64, 4, scorer, output)[2], (cu_of(b), max(b))) for b in batches]
    checks.assert_compiles(function, calls)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    scorer=st.sampled_from(["dense", "per_sequence", "per_head"]),
    output=st.sampled_from(["slice", "full"]),
    heads=st.sampled_from([1, 2, 8]),
)
def test_any_lengths(lengths, scorer, output, heads):
    checks.assert_exact(*problem(lengths, 16, heads, scorer, output))


def test_an_exported_pool_takes_as_many_sequences_as_it_has_heads():
    class Pool(torch.nn.Module):
        def forward(self, x, scorer, cu_seqlens):
            return hk.additive_pool(x, scorer, cu_seqlens, 5, 4)

    x, scorer = torch.randn(30, 8), torch.randn(4, 2)
    free = {0: torch.export.Dim.AUTO}
    program = torch.export.export(Pool(), (x, scorer, cu_of([5] * 6)), dynamic_shapes=(free, None, free))
    four = x[:20], scorer, cu_of([5] * 4)
    torch.testing.assert_close(program.module()(*four), Pool()(*four))
