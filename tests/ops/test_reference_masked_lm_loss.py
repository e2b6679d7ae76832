"""Reference of masked_lm_loss against the formula."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, formulas
from .checks import BF16, F32, randn

pytestmark = pytest.mark.usefixtures("reference")


def bind(function, labels, **options):
    """The loss (without the count) as a function of its floating inputs."""

    def loss(hidden, weight, bias=None):
        return function(hidden, weight, bias, labels, **options)[0]

    return loss


def problem(rows, width=64, vocabulary=101, ignored=0.3, **options):
    """The loss, its formula, and hidden, weight, bias; a share of the labels is ignored."""
    labels = torch.randint(vocabulary, (rows,))
    labels[torch.rand(rows) < ignored] = options.get("ignore_index", -100)
    inputs = [randn(rows, width), randn(vocabulary, width, scale=width**-0.5), randn(vocabulary)]
    return *(bind(function, labels, **options) for function in (hk.masked_lm_loss, formulas.masked_lm_loss)), inputs


OPTIONS = [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"num_masked": 17}, {"num_masked": torch.tensor(17)}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [1, 37, 129])
def test_exact_in_float64(rows, options):
    checks.assert_exact(*problem(rows, **options))


@pytest.mark.parametrize(("rows", "width"), [(37, 192), (7, 1000), (1000, 64)])
def test_other_sizes(rows, width):
    checks.assert_exact(*problem(rows, width, vocabulary=7, label_smoothing=0.3))


def test_no_bias():
    op, formula, inputs = problem(37, label_smoothing=0.1)
    checks.assert_exact(op, formula, inputs[:2])


@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("rows", [7, 129])
def test_single_and_half_precision(rows, options, dtype, parameter):
    checks.assert_within_policy(lambda: problem(rows, **options), dtype, parameter)
    op, _, inputs = problem(rows, **options)
    assert op(*[t.to(dtype) for t in inputs]).dtype == F32


def test_the_right_guesses_are_counted():
    labels = torch.tensor([2, -100, 0, 1, 2])
    hidden = torch.eye(3, dtype=torch.float64)[[2, 1, 0, 0, 2]]
    loss, correct = hk.masked_lm_loss(hidden, torch.eye(3, dtype=torch.float64), None, labels)
    assert (int(correct), correct.dtype, correct.shape, correct.requires_grad) == (3, torch.int64, (), False)
    assert loss.shape == () and loss.dtype == torch.float64
    logits = hidden.requires_grad_()
    assert not hk.masked_lm_loss(logits, torch.eye(3, dtype=torch.float64), None, labels)[1].requires_grad


@pytest.mark.parametrize("ignore_index", [-1, 2])  # 2 is a guess that may be right and must not count
@pytest.mark.parametrize("rows", [7, 129])
def test_count_is_that_of_the_formula(rows, ignore_index):
    labels = torch.randint(min(ignore_index, 0), 5, (rows,))
    arguments = (randn(rows, 64), randn(5, 64), randn(5), labels)
    expected = formulas.masked_lm_loss(*arguments, ignore_index=ignore_index)
    assert torch.equal(hk.masked_lm_loss(*arguments, ignore_index=ignore_index)[1], expected[1])


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_predict(rows):
    op, _, inputs = problem(rows, ignored=1.1)
    checks.assert_zero_gradients(op, inputs, ())


def test_ignored_rows_do_not_change_the_loss():
    labels = torch.randint(101, (12,))
    hidden, weight, bias = problem(12)[2]
    masked = labels.clone()
    masked[3:] = -100
    actual = hk.masked_lm_loss(hidden, weight, bias, masked)
    expected = hk.masked_lm_loss(hidden[:3], weight, bias, labels[:3])
    checks.assert_equal_to_rounding({"loss": actual[0]}, {"loss": expected[0]})
    assert torch.equal(actual[1], expected[1])


def test_parts_of_a_batch_sum_to_the_whole():
    labels = torch.randint(101, (12,))
    hidden, weight, bias = problem(12)[2]
    whole, right = hk.masked_lm_loss(hidden, weight, bias, labels)
    parts = [hk.masked_lm_loss(hidden[s], weight, bias, labels[s], num_masked=12) for s in (slice(5), slice(5, 12))]
    checks.assert_equal_to_rounding({"loss": parts[0][0] + parts[1][0]}, {"loss": whole})
    assert parts[0][1] + parts[1][1] == right


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_huge_logits(label_smoothing):
    op, formula, inputs = problem(37, label_smoothing=label_smoothing)
    inputs[1] *= 1e4
    checks.assert_exact(op, formula, inputs, 1e4 * checks.FLOAT64_BOUND)  # the error of a logit of 1e4
    assert all(v.isfinite().all() for v in checks.evaluate(op, [t.float() for t in inputs]).values())


def test_strides_do_not_matter():
    op, _, inputs = problem(37)
    checks.assert_strides_do_not_matter(op, inputs)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_gradcheck(options):
    op, _, inputs = problem(4, 3, 5, **options)
    checks.assert_gradcheck(op, inputs)


def test_compiles():
    def function(hidden, weight, bias, labels):
        return hk.masked_lm_loss(hidden, weight, bias, labels, label_smoothing=0.1)[0]

    calls = [(problem(rows)[2], (torch.randint(101, (rows,)),)) for rows in (2, 37)]
    checks.assert_compiles(function, calls)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    rows=st.integers(1, 20),
    vocabulary=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    label_smoothing=st.floats(0, 0.9),
)
def test_any_size(rows, vocabulary, ignored, label_smoothing):
    op, formula, inputs = problem(rows, 16, vocabulary, ignored, label_smoothing=label_smoothing)
    if ignored < 1:
        checks.assert_exact(op, formula, inputs)
    else:
        checks.assert_zero_gradients(op, inputs, ())
