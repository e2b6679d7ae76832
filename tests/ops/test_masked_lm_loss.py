"""masked_lm_loss through the whole chain: public function, autograd, chunk loop, compiled row kernels."""

import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hbert_kernels as hk
from hbert_kernels._accuracy import compare
from hbert_kernels.ops.masked_lm_loss import _chunk_bounds

from . import checks, formulas
from .checks import BF16, F32, F64, randn

OPTIONS = [{}, {"label_smoothing": 0.1}, {"num_masked": 17}, {"num_masked": torch.tensor(17)}, {"ignore_index": 3}]


@pytest.fixture(autouse=True)
def compiled_kernels():
    """Every test here is about the compiled kernel: none may pass on the reference path."""
    with hk.use_backend("cpp"):
        yield


def problem(rows, width=64, vocab=101, dtype=F64, parameter=None, ignored=0.3):
    """hidden, weight, bias, and labels of which a share is ignored."""
    labels = torch.randint(vocab, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    inputs = [randn(rows, width), randn(vocab, width, scale=width**-0.5), randn(vocab)]
    return [t.to(d) for t, d in zip(inputs, [dtype, parameter or dtype, parameter or dtype], strict=True)], labels


def bind(function, labels, **options):
    return lambda hidden, weight, bias=None: function(hidden, weight, bias, labels, **options)[0]


def assert_accurate(*shape, scale=1.0, draws=20, ignored=0.3, **options):
    """The numerics policy for the worst of several random problems.

    The loss is one number and a small problem's gradients hang on few roundings of bfloat16 logits: in one draw, how
    wrong plain torch happens to be is luck (over 150 draws each of the two is often twice as wrong as the other).
    """
    errors, bounds = {}, {}
    for seed in range(draws):
        torch.manual_seed(seed)
        inputs, labels = problem(*shape, ignored=ignored)
        inputs[1] *= scale
        for r in compare(bind(hk.masked_lm_loss, labels, **options), inputs, "cpp"):
            errors.setdefault(r.name, []).append(r.error)
            bounds.setdefault(r.name, []).append(r.bound)
    assert list(errors) == ["output 0", "gradient 0", "gradient 1", "gradient 2"]
    for name, drawn in errors.items():
        assert all(e <= max(bounds[name]) for e in drawn), (name, drawn, bounds[name])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 37, 129, 1000])
def test_exact_in_float64(rows, options):
    inputs, labels = problem(rows)
    labels[labels == -100] = options.get("ignore_index", -100)
    checks.assert_exact(
        bind(hk.masked_lm_loss, labels, **options), bind(formulas.masked_lm_loss, labels, **options), inputs
    )


@pytest.mark.parametrize("count", [torch.tensor([17]), torch.tensor(17.0, dtype=F64)], ids=str)
def test_a_divisor_has_no_say_in_shape_and_dtype(count):
    (hidden, weight, bias), labels = problem(7, dtype=F32)
    for backend in ("cpp", "reference"):
        with hk.use_backend(backend):
            loss, correct = hk.masked_lm_loss(hidden, weight, bias, labels, num_masked=count)
        assert (loss.shape, loss.dtype, correct.shape) == ((), F32, ())


def test_a_number_of_tokens_is_one_whatever_the_default_device():
    inputs, labels = problem(7)
    expected = hk.masked_lm_loss(*inputs, labels, num_masked=17)
    with torch.device("meta"):
        assert hk.masked_lm_loss(*inputs, labels, num_masked=17) == expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 64, 101), (7, 1000, 7), (37, 64, 301), (129, 192, 101)])
def test_accurate_at_odd_sizes(rows, width, vocab, dtype, parameter, smoothing):
    assert_accurate(rows, width, vocab, dtype, parameter, label_smoothing=smoothing)


@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
def test_accurate_over_several_chunks(monkeypatch, dtype, parameter):
    # The module, which the package's function of the same name hides.
    monkeypatch.setattr(sys.modules[_chunk_bounds.__module__], "_CHUNK_BYTES", 1)
    assert len(_chunk_bounds(200, 301, dtype.itemsize)) > 2
    assert_accurate(200, 16, 301, dtype, parameter, ignored=0.0)


@hypothesis.given(rows=st.integers(0, 5000), vocab=st.integers(1, 300_000), itemsize=st.sampled_from([2, 4, 8]))
def test_chunks_cover_the_rows_once(rows, vocab, itemsize):
    bounds = _chunk_bounds(rows, vocab, itemsize)
    assert [i for begin, end in bounds for i in range(begin, end)] == list(range(rows))
    assert all(end - begin <= max(64, 40_000_000 // (vocab * itemsize)) for begin, end in bounds)


@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_wanted_gradients_are_made(present):
    inputs, labels = problem(37)
    leaves = [t.requires_grad_(p) for t, p in zip(inputs, present, strict=True)]
    hk.masked_lm_loss(*leaves, labels)[0].backward()
    assert tuple(t.grad is not None for t in leaves) == present
    with hk.use_backend("reference"):
        expected = torch.autograd.grad(hk.masked_lm_loss(*leaves, labels)[0], [t for t in leaves if t.requires_grad])
    checks.assert_equal_to_rounding({"g": next(t.grad for t in leaves if t.requires_grad)}, {"g": expected[0]})


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_without_bias_and_without_gradients(dtype):
    (hidden, weight, _), labels = problem(37, dtype=dtype)
    with torch.inference_mode():
        loss, correct = hk.masked_lm_loss(hidden, weight, None, labels)
    expected = hk.masked_lm_loss(hidden.clone().requires_grad_(), weight, None, labels)
    assert torch.equal(loss, expected[0].detach()) and torch.equal(correct, expected[1])
    assert (loss.requires_grad, expected[0].requires_grad, expected[1].requires_grad) == (False, True, False)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_predict(rows):
    inputs, labels = problem(rows, ignored=1.1)
    checks.assert_zero_gradients(bind(hk.masked_lm_loss, labels), inputs, ())


def test_ignored_rows_are_not_read():
    inputs, labels = problem(12, ignored=0.5)
    expected = checks.evaluate(bind(hk.masked_lm_loss, labels), inputs)
    inputs[0][labels == -100] = torch.nan
    for name, value in checks.evaluate(bind(hk.masked_lm_loss, labels), inputs).items():
        assert torch.equal(value, expected[name]), name


def test_the_first_of_equal_logits_is_the_guess():
    weight = torch.eye(4)[[0, 1, 1, 2]]  # logits 1 and 2 are always equal
    hidden = torch.eye(4)[[1, 1, 0, 2]]
    labels = torch.tensor([1, 2, 0, 3])
    assert int(hk.masked_lm_loss(hidden, weight, None, labels)[1]) == 3
    long = torch.zeros(1000, 4)  # every logit equal, across whole vectors
    assert int(hk.masked_lm_loss(hidden, long, None, torch.tensor([0, 999, 500, 0]))[1]) == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_huge_logits(dtype, smoothing):
    inputs, labels = problem(37, dtype=dtype)
    inputs[1] *= 1e4
    assert all(v.isfinite().all() for v in checks.evaluate(bind(hk.masked_lm_loss, labels), inputs).values())
    assert_accurate(37, 64, 101, dtype, dtype, scale=1e4, label_smoothing=smoothing)


def test_a_masked_out_class_has_probability_zero():
    inputs, labels = problem(7, ignored=0.0)
    inputs[2][5], labels[labels == 5] = -torch.inf, 4
    actual = checks.evaluate(bind(hk.masked_lm_loss, labels), inputs)
    with hk.use_backend("reference"):  # the formula itself would multiply 0 by infinity
        checks.assert_equal_to_rounding(actual, checks.evaluate(bind(hk.masked_lm_loss, labels), inputs))
    assert actual["gradient 2"][5] == 0


def test_nan_reaches_the_loss():
    inputs, labels = problem(7, ignored=0.0)
    inputs[0][2, 3] = torch.nan
    assert hk.masked_lm_loss(*inputs, labels)[0].isnan()


def test_strides_do_not_matter():
    inputs, labels = problem(37)
    checks.assert_strides_do_not_matter(bind(hk.masked_lm_loss, labels), inputs)


def test_same_bits_from_run_to_run():
    inputs, labels = problem(129, 64, 1000, F32)
    first, second = (checks.evaluate(bind(hk.masked_lm_loss, labels), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_again_over_a_retained_graph():
    inputs, labels = problem(37)
    leaves = [t.requires_grad_() for t in inputs]
    loss = hk.masked_lm_loss(*leaves, labels)[0]
    first = torch.autograd.grad(loss, leaves, torch.tensor(2.0, dtype=F64), retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(one, 2 * two)


def test_a_weight_tied_to_the_embeddings_gets_both_gradients():
    (_, weight, bias), labels = problem(9)
    grads = []
    for backend in ("cpp", "reference"):
        tied = weight.clone().requires_grad_()
        with hk.use_backend(backend):
            hk.masked_lm_loss(tied[torch.arange(9)].tanh(), tied, bias, labels)[0].backward()
        grads.append(tied.grad)
    checks.assert_equal_to_rounding({"g": grads[0]}, {"g": grads[1]})


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_gradcheck(options):
    inputs, labels = problem(4, 3, 5)
    checks.assert_gradcheck(bind(hk.masked_lm_loss, labels, **options), inputs)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_opcheck(dtype):
    inputs, labels = problem(7, 24, dtype=dtype)
    ops = torch.ops.hbert_kernels
    for wanted in ([True, True, True], [False, False, False], [True, False, True]):
        torch.library.opcheck(ops.masked_lm_loss.default, (*inputs, labels, None, -100, 0.1, wanted))
    strided = [t.t().contiguous().t() for t in inputs[:2]]
    for targets in (labels, labels.clamp(0, 23)):
        arguments = *strided, None, targets, None, -100, 0.1, [True, True, False]
        torch.library.opcheck(ops.masked_lm_loss.default, arguments)
    logits = torch.randn(7, 24, dtype=dtype)
    torch.library.opcheck(ops.softmax_cross_entropy_.default, (logits, None, labels.clamp(0, 23), 0.1, 0.5, True))
    if dtype != F64:
        remainder = torch.zeros_like(logits) if dtype == BF16 else None
        torch.library.opcheck(ops.accumulate_.default, (logits, remainder, torch.randn(7, 24)))


@pytest.mark.parametrize("wanted", [[False] * 3, [True, False, False], [False, True, True]], ids=str)
def test_fakes_have_the_dtypes_of_parameters_wider_than_the_activations(wanted):
    inputs, labels = problem(7, dtype=BF16, parameter=F32)
    op, options = torch.ops.hbert_kernels.masked_lm_loss, (None, -100, 0.0, wanted)
    fakes = op(*[t.to("meta") for t in (*inputs, labels)], *options)
    for given, fake in zip(op(*inputs, labels, *options), fakes, strict=True):
        assert (given.dtype, given.shape) == (fake.dtype, fake.shape)


def test_a_compensated_sum_does_not_lose_small_terms():
    total, remainder = torch.ones(1001, dtype=BF16), torch.zeros(1001, dtype=BF16)
    for _ in range(256):  # each is far below half a unit in the last place of 1
        torch.ops.hbert_kernels.accumulate_(total, remainder, torch.full((1001,), 2.0**-10))
    assert torch.equal(total, torch.full((1001,), 1.25, dtype=BF16))


def test_compiles_without_graph_breaks_or_recompiles():
    def function(hidden, weight, bias, labels):
        return hk.masked_lm_loss(hidden, weight, bias, labels, label_smoothing=0.1)[0]

    calls = [((inputs := problem(rows))[0], (inputs[1],)) for rows in (2, 5, 37)]
    checks.assert_compiles(function, calls)


def test_compiles_with_inductor():
    torch._dynamo.reset()
    inputs, labels = problem(5, dtype=F32)
    compiled = torch.compile(hk.masked_lm_loss, fullgraph=True)
    actual = checks.evaluate(lambda *t: compiled(*t, labels)[0], inputs)
    for name, value in checks.evaluate(bind(hk.masked_lm_loss, labels), inputs).items():
        torch.testing.assert_close(actual[name], value)


def test_autocast_with_activation_checkpointing():
    decoder, labels = torch.nn.Linear(40, 90), torch.randint(90, (6,))

    def block(x):
        return hk.masked_lm_loss(torch.mm(x, x.t() @ x), decoder.weight, decoder.bias, labels)[0]

    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = torch.eye(6, 40, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(x)
        loss.backward()
        gradients.append([x.grad, decoder.weight.grad, decoder.bias.grad])
        decoder.zero_grad()
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
    assert loss.dtype == gradients[0][1].dtype == F32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(labels=a["labels"] + 24), r"label \d+ is not in \[0, 24\)"),
        (lambda a: a.update(labels=a["labels"][1:]), "labels must be contiguous int64"),
        (lambda a: a.update(bias=a["bias"].double()), "bias must be"),
        (lambda a: a.update(logits=a["logits"].t()), "logits must be"),
    ],
)
def test_the_row_op_itself_refuses_what_does_not_fit(change, message):
    arguments = dict(
        logits=torch.randn(7, 24), bias=torch.randn(24), labels=torch.arange(7), label_smoothing=0.0, scale=1.0,
        gradient=True,
    )  # fmt: skip
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hbert_kernels.softmax_cross_entropy_(**arguments)
