"""Masked-language-model loss in Triton: the kernels in the interpreter, and the driver over chunks of rows."""

from unittest import mock

import pytest
import torch
import triton_ops
from ops import checks, formulas, kernel_checks
from ops.checks import BF16, F32, randn

from hbert_kernels.ops.masked_lm_loss import _MaskedLMLoss
from hbert_kernels.triton import masked_lm_loss as loss_module

F16 = torch.float16
each_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
each_smoothing = pytest.mark.parametrize("smoothing", [0.0, 0.1])


def problem(rows, width=24, vocab=101, ignored=0.3):
    """hidden, weight, bias, and labels of which a share is ignored."""
    labels = torch.randint(vocab, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    return [randn(rows, width), randn(vocab, width, scale=width**-0.5), randn(vocab)], labels


def bind(labels, num_masked=None, ignore_index=-100, label_smoothing=0.0):
    """The loss as a differentiable function of hidden, weight and bias, with the public function's backward pass."""

    def loss(*tensors):
        wanted = [t is not None for t in tensors]
        with mock.patch.object(torch.ops.hbert_kernels, "masked_lm_loss", loss_module.masked_lm_loss):
            return _MaskedLMLoss.apply(*tensors, labels, num_masked, ignore_index, label_smoothing, wanted)[0]

    return loss


def formula(labels, **options):
    return lambda *tensors: formulas.masked_lm_loss(*tensors, labels, **options)[0]


def assert_accurate(*shape, dtype=F32, parameter=None, smoothing=0.0):
    """The numerics policy for the worst of several problems: how wrong a single number is, is a matter of luck."""
    errors, bounds = {}, {}
    for seed in range(8):
        torch.manual_seed(seed)
        inputs, labels = problem(*shape, ignored=0.3 if shape[0] > 5 else 0.0)
        inputs = [t.to(d) for t, d in zip(inputs, [dtype, parameter or dtype, parameter or dtype], strict=True)]
        function, plain = bind(labels, label_smoothing=smoothing), formula(labels, label_smoothing=smoothing)
        exact = checks.evaluate(plain, [t.double() for t in inputs])
        losses = checks.evaluate(plain, inputs)
        for name, value in checks.evaluate(function, inputs).items():
            rows = shape[0] if name == "gradient 2" else 1
            errors.setdefault(name, []).append(checks.max_error(value, exact[name]))
            plain_error = checks.max_error(losses[name], exact[name])
            bounds.setdefault(name, []).append(checks.error_bound(exact[name], plain_error, value.dtype, rows))
    for name, drawn in errors.items():
        assert all(error <= max(bounds[name]) for error in drawn), (name, drawn, bounds[name])


@each_smoothing
@each_dtype
@pytest.mark.parametrize("shape", [(1, 24, 101), (13, 24, 301)], ids=str)
def test_accurate_at_odd_sizes(shape, dtype, smoothing):
    assert_accurate(*shape, dtype=dtype, smoothing=smoothing)


@pytest.mark.parametrize(("dtype", "parameter"), [(BF16, F32), (F16, F32), (F32, BF16)], ids=str)
def test_accurate_with_parameters_of_another_dtype(dtype, parameter):
    assert_accurate(13, 24, 301, dtype=dtype, parameter=parameter)


@pytest.mark.parametrize(
    ("dtype", "parameter"), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)], ids=str
)
def test_accurate_over_several_chunks(monkeypatch, dtype, parameter):
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 7 * 128 * dtype.itemsize)
    assert_accurate(20, 24, 101, dtype=dtype, parameter=parameter)


@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
def test_a_strided_weight_over_several_chunks(monkeypatch, dtype, parameter):
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 7 * 128 * dtype.itemsize)
    inputs, labels = problem(20)
    hidden, weight, bias = inputs[0].to(dtype), *(t.to(parameter) for t in inputs[1:])
    expected = checks.evaluate(bind(labels), [hidden, weight, bias])
    actual = checks.evaluate(lambda h, w, b: bind(labels)(h, w.t().contiguous().t(), b), [hidden, weight, bias])
    kernel_checks.assert_same_values(actual, expected)


@each_dtype
def test_a_vocabulary_of_several_blocks(dtype):
    assert_accurate(3, 24, 9001, dtype=dtype, smoothing=0.1)


@pytest.mark.parametrize("parameter", [F16, F32], ids=str)
@pytest.mark.parametrize(("num_masked", "scale"), [(None, 128.0), (torch.tensor(1e6), 65536.0)], ids=str)
def test_a_loss_scale_saves_the_gradients_of_half_precision(num_masked, scale, parameter):
    (hidden, weight, bias), labels = problem(13)
    inputs = [hidden.to(F16), (weight / 50).to(parameter), bias.to(parameter)]
    loss = bind(labels, num_masked)
    actual = checks.evaluate(lambda *t: loss(*t) * scale, inputs)
    exact = checks.evaluate(lambda *t: formula(labels, num_masked=num_masked)(*t) * scale, [t.double() for t in inputs])
    for name in ("gradient 0", "gradient 1", "gradient 2"):  # within some roundings of float16
        assert (actual[name].double() - exact[name]).norm() <= 5e-3 * exact[name].norm(), name


@pytest.mark.parametrize("options", [{"num_masked": torch.tensor(17.0)}, {"ignore_index": 3}], ids=str)
def test_options(options):
    inputs, labels = problem(13)
    labels[labels == -100] = options.get("ignore_index", -100)
    actual = checks.evaluate(bind(labels, **options), [t.float() for t in inputs])
    expected = checks.evaluate(formula(labels, **options), inputs)
    checks.assert_equal_to_rounding({n: v.double() for n, v in actual.items()}, expected, 1e-6)


@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_wanted_gradients_are_made(present):
    inputs, labels = problem(13)
    inputs = [t.float() for t in inputs]
    arguments = *inputs, labels, None, -100, 0.0
    loss, correct, *gradients = loss_module.masked_lm_loss(*arguments, list(present))
    full_loss, full_correct, *expected = loss_module.masked_lm_loss(*arguments, [True] * 3)
    assert torch.equal(loss, full_loss) and torch.equal(correct, full_correct)
    for wanted, given, gradient in zip(present, gradients, expected, strict=True):
        assert torch.equal(given, gradient) if wanted else given.shape == (0,)


def test_results_are_those_of_the_schema():
    inputs, labels = problem(5)
    for dtype, bias, strided in ((F32, True, False), (BF16, False, False), (F32, True, True)):
        hidden, weight, last = (t.to(dtype) for t in inputs)
        if strided:
            hidden, weight = (t.t().contiguous().t() for t in (hidden, weight))
        arguments = hidden, weight, last if bias else None, labels, None, -100, 0.0, [True, True, bias]
        given = loss_module.masked_lm_loss(*arguments)
        meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments]
        for one, fake in zip(given, torch.ops.hbert_kernels.masked_lm_loss(*meta), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_predict(rows):
    inputs, _ = problem(rows)
    checks.assert_zero_gradients(bind(torch.full((rows,), -100)), [t.float() for t in inputs], ())


@each_dtype
def test_ignored_rows_leave_no_trace(dtype):
    inputs, labels = problem(9, ignored=0.5)
    inputs = [t.to(dtype) for t in inputs]
    expected = checks.evaluate(bind(labels), inputs)
    inputs[0][labels == -100] = torch.nan
    kernel_checks.assert_same_values(checks.evaluate(bind(labels), inputs), expected)


def logits_of(*shape, dtype=F32):
    return randn(*shape).to(dtype), torch.randint(shape[1], (shape[0],))


def test_the_first_of_equal_logits_is_the_guess():
    labels = torch.tensor([1, 2, 0, 3])
    logits = torch.eye(4)[:, [0, 1, 1, 2]][[1, 1, 0, 2]]
    assert loss_module.softmax_cross_entropy_(logits, None, labels, 0.0, 1.0, False)[1].tolist() == [1, 0, 1, 1]
    equal = torch.zeros(3, 5000)  # across blocks and lanes
    labels = torch.tensor([0, 4999, 4096])
    assert loss_module.softmax_cross_entropy_(equal, None, labels, 0.0, 1.0, False)[1].tolist() == [1, 0, 0]


@each_smoothing
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_logits(offset, smoothing):
    logits, labels = logits_of(5, 301)
    logits = logits * 100 + offset
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, labels, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    loss, _ = loss_module.softmax_cross_entropy_(logits, None, labels, smoothing, 1.0, True)
    plain = torch.nn.functional.cross_entropy(
        exact.detach().float(), labels, label_smoothing=smoothing, reduction="none"
    )
    assert checks.max_error(loss, losses) <= checks.error_bound(losses, checks.max_error(plain, losses), F32)
    assert checks.max_error(logits, gradient) <= 1e4 * torch.finfo(F32).eps


def test_a_masked_out_class_has_probability_zero():
    logits, labels = logits_of(5, 40)
    logits[:, 7], labels[labels == 7] = -torch.inf, 6
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss, _ = loss_module.softmax_cross_entropy_(logits, None, labels, 0.0, 1.0, True)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logits[:, 7], torch.zeros(5))


def test_nan_reaches_the_loss_of_its_row():
    logits, labels = logits_of(3, 5000)
    logits[1, 4500] = torch.nan
    loss, _ = loss_module.softmax_cross_entropy_(logits, None, labels, 0.0, 1.0, True)
    assert loss.isnan().tolist() == [False, True, False]


def test_a_label_that_does_not_exist_gives_nan():
    logits, _ = logits_of(3, 40)
    for label in (40, -1, -7):
        labels = torch.tensor([label, 0, 39])
        loss, _ = loss_module.softmax_cross_entropy_(logits.clone(), None, labels, 0.0, 1.0, True)
        assert loss.isnan().tolist() == [True, False, False]


def test_only_the_ignored_index_is_ignored():
    inputs, labels = problem(9)
    labels[4] = -1
    hidden, weight, bias = (t.float() for t in inputs)
    loss, *_ = loss_module.masked_lm_loss(hidden, weight, bias, labels, None, -100, 0.0, [True] * 3)
    assert loss.isnan()


def test_rows_may_be_strided():
    logits, labels = logits_of(4, 50)
    wide = torch.full((4, 64), torch.nan)
    wide[:, :50] = logits
    strided = wide[:, :50]
    expected = loss_module.softmax_cross_entropy_(logits, None, labels, 0.1, 0.5, True)
    actual = loss_module.softmax_cross_entropy_(strided, None, labels, 0.1, 0.5, True)
    for one, two in zip((*actual, strided), (*expected, logits), strict=True):
        assert torch.equal(one, two)
    assert wide[:, 50:].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sums_over_chunks(dtype):
    total, term = randn(1001).to(dtype), randn(1001)
    remainder = torch.zeros_like(total) if dtype == BF16 else None
    expected = (total.double() + term.float()).to(dtype)
    loss_module.accumulate_(total, remainder, term.float())
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_compensated_sum_does_not_lose_small_terms(dtype):
    total, remainder = torch.ones(1001, dtype=dtype), torch.zeros(1001, dtype=dtype)
    for _ in range(64):  # each is far below half a unit in the last place of 1
        loss_module.accumulate_(total, remainder, torch.full((1001,), 2.0**-12))
    assert torch.equal(total, torch.full((1001,), 1 + 2.0**-6, dtype=dtype))


def test_same_bits_in_any_order_of_programs():
    inputs, labels = problem(13)
    values = []
    for seed in (1, 2):
        with triton_ops.checked(seed=seed):
            values.append(checks.evaluate(bind(labels), [t.float() for t in inputs]))
    kernel_checks.assert_same_values(*values)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_logits_are_read_twice_and_written_once_in_one_launch(dtype, launches):
    inputs, labels = problem(4, vocab=30522, ignored=0.0)
    hidden, weight, bias = (t.to(dtype) for t in inputs)
    loss_module.masked_lm_loss(hidden, weight, bias, labels, None, -100, 0.0, [True] * 3)
    (launch,) = launches
    logits = 4 * 30522 * dtype.itemsize
    assert launch.stored["LOGITS"] <= 1.05 * logits
    assert launch.loaded["LOGITS"] <= 1.05 * 2 * logits


def test_blocks_fit_the_vocabulary():
    assert [loss_module.block_columns(vocab) for vocab in (1, 101, 4096, 30522)] == [16, 128, 4096, 4096]
