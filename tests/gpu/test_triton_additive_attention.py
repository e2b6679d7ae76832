"""The driver of additive attention for GPUs, over the Triton kernels in the interpreter."""

from types import SimpleNamespace

import pytest
import torch
import triton_accuracy
import triton_ops
from ops import checks, formulas, kernel_checks
from ops.checks import BF16, F32, RAGGED, affine, cu_of, randn

import hbert_kernels as hk
from hbert_kernels import _check
from hbert_kernels.gpu import additive_attention as driver
from hbert_kernels.triton import additive_pool, row_norm

F16 = torch.float16
KERNELS = SimpleNamespace(
    additive_pool=additive_pool.additive_pool,
    additive_pool_backward=additive_pool.additive_pool_backward,
    gated_layer_norm=row_norm.gated_layer_norm,
    gated_layer_norm_backward=row_norm.gated_layer_norm_backward,
)
EPS = 1e-12
each_form = pytest.mark.parametrize("form", ["direct", "key_free"])
each_scorer = pytest.mark.parametrize("scorer", ["dense", "per_head"])
each_sub_norm = pytest.mark.parametrize("sub_norm", [False, True])


def attention(query, x, query_att, key_weight, key_att, key_bias, norm_weight, norm_bias, *options):
    """The driver as a differentiable op; ``options`` are cu_seqlens, num_heads, form, sub_norm."""
    cu_seqlens, num_heads, form, sub_norm = options

    def arguments(query, x, query_att, key_att, key_weight, key_bias, norm_weight, norm_bias):
        key = cu_seqlens, num_heads, key_weight, key_bias, form == "key_free"
        return query, x, query_att, key_att, *key, norm_weight, norm_bias, sub_norm

    def forward(*tensors):
        return driver.additive_attention(*arguments(*tensors), EPS, ops=KERNELS)

    def backward(cotangents, results, tensors):
        out, *saved = results
        return driver.additive_attention_backward(*cotangents, *arguments(*tensors), *saved, ops=KERNELS)

    op = triton_ops.differentiable(forward, backward)
    return op(query, x, query_att.float(), key_att.float(), key_weight, key_bias, norm_weight, norm_bias)


def formula(query, x, query_att, key_weight, key_att, key_bias, norm_weight, norm_bias, *options):
    cu_seqlens, num_heads, _, sub_norm = options
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias} if sub_norm else {}
    arguments = query, x, query_att, key_weight, key_bias, key_att, cu_seqlens, 0, num_heads
    return formulas.additive_attention(*arguments, sub_norm=sub_norm, eps=EPS, **norm)


def tensors(lengths, width, heads, scorer="dense"):
    """query, x, query_att, key_weight, key_att, key_bias, norm_weight, norm_bias; logits of a few units."""
    tokens, columns = sum(lengths), width if scorer == "dense" else width // heads
    wide = (width / heads / columns) ** 0.5
    inputs = [randn(tokens, width), randn(tokens, width), randn(heads, columns, scale=wide)]
    inputs += [randn(width, width, scale=width**-0.5), randn(heads, columns, scale=2 * wide)]
    return [*inputs, randn(width), *affine(width)]


def bind(function, lengths, heads, form, sub_norm):
    """The function of the first tensors; the last two, of the norm, are left out without norm."""
    absent = [] if sub_norm else [None, None]
    return lambda *given: function(*given, *absent, cu_of(lengths), heads, form, sub_norm)


def problem(lengths, width, heads, form, scorer="dense", sub_norm=True):
    pair = [bind(function, lengths, heads, form, sub_norm) for function in (attention, formula)]
    return *pair, tensors(lengths, width, heads, scorer)[: 8 if sub_norm else 6]


def cast(inputs, dtype, parameter=None):
    return [t.to(dtype if i < 2 else parameter or dtype) for i, t in enumerate(inputs)]


@each_sub_norm
@each_scorer
@each_form
def test_accurate_in_single_precision(form, scorer, sub_norm):
    op, formula, inputs = problem([37, 0, 1, 70], 40, 5, form, scorer, sub_norm)
    triton_accuracy.assert_accurate(op, formula, cast(inputs, F32), 108)


def reference(query, x, query_att, key_weight, key_att, key_bias, norm_weight, norm_bias, *options):
    """The same form in plain torch, which rounds the same products."""
    cu_seqlens, num_heads, form, sub_norm = options
    with hk.use_backend("reference"):
        return hk.additive_attention(
            query, x, query_att, key_weight, key_bias, key_att, cu_seqlens, 70, num_heads,
            norm_weight=norm_weight, norm_bias=norm_bias, sub_norm=sub_norm, form=form,
        )  # fmt: skip


@each_form
@pytest.mark.parametrize(
    ("dtype", "parameter", "scorer", "sub_norm"),
    [
        (BF16, BF16, "dense", True),
        (BF16, F32, "per_head", False),
        (F16, F32, "dense", True),
        (F32, BF16, "dense", True),
    ],
    ids=str,
)
def test_accurate_in_half_precision(monkeypatch, form, dtype, parameter, scorer, sub_norm):
    monkeypatch.setattr(_check, "_CPU_DTYPES", _check._GPU_DTYPES)  # else the reference refuses float16 here
    op, _, inputs = problem([37, 0, 1, 70], 40, 5, form, scorer, sub_norm)
    plain = bind(reference, [37, 0, 1, 70], 5, form, sub_norm)
    triton_accuracy.assert_accurate(op, plain, cast(inputs, dtype, parameter), 108)


@each_form
@each_scorer
@pytest.mark.parametrize(
    ("dtype", "sub_norm", "strided"), [(F32, True, False), (BF16, False, False), (F32, False, True)], ids=str
)
def test_results_are_those_of_the_schema(form, scorer, dtype, sub_norm, strided):
    lengths = [3, 0, 5]
    inputs = cast(tensors(lengths, 24, 3, scorer), dtype, F32)
    if strided:
        inputs = [t.t().contiguous().t() for t in inputs]
    query, x, query_att, key_weight, key_att, key_bias, *norm = inputs
    key = key_weight, key_bias, form == "key_free"
    arguments = query, x, query_att, key_att, cu_of(lengths), 3, *key, *norm, sub_norm
    results = driver.additive_attention(*arguments, EPS, ops=KERNELS)
    gradients = driver.additive_attention_backward(query, *arguments, *results[1:], ops=KERNELS)
    ops = torch.ops.hbert_kernels
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments]
    fakes = ops.additive_attention(*meta, EPS)
    fake_gradients = ops.additive_attention_backward(query.to("meta"), *meta, *fakes[1:])
    for given, fake in zip((*results, *gradients), (*fakes, *fake_gradients), strict=True):
        assert (given.shape, given.dtype, given.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_large_logits():
    for form in ("direct", "key_free"):
        op, _, inputs = problem([7, 1, 30], 64, 4, form)
        inputs[2], inputs[4] = inputs[2] * 1e4, inputs[4] * 1e4
        assert all(value.isfinite().all() for value in checks.evaluate(op, cast(inputs, F32)).values())


@each_form
@each_sub_norm
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths, form, sub_norm):
    op, _, inputs = problem(lengths, 24, 3, form, sub_norm=sub_norm)
    checks.assert_zero_gradients(op, cast(inputs, F32), (0, 24))


@each_form
@each_sub_norm
def test_dead_rows_are_inert(form, sub_norm):
    op, _, inputs = problem([5, 0, 40], 24, 3, form, sub_norm=sub_norm)
    inputs = cast(inputs, F32)
    kernel_checks.assert_gradients_of_dead_rows_are_not_read(op, inputs, 2)
    dead = torch.full((3, 24), torch.nan)
    out = op(*[torch.cat([t, dead]) for t in inputs[:2]], *inputs[2:])
    assert torch.equal(out[45:], torch.zeros(3, 24)) and torch.equal(out[:45], op(*inputs))


@each_form
def test_sequences_do_not_see_each_other(form):
    op, _, inputs = problem([3, 70, 5], 24, 3, form)
    query, x, *parameters = cast(inputs, F32)
    clean = op(query, x, *parameters)
    query[3:73] = x[3:73] = torch.nan
    hit = torch.zeros(78, dtype=torch.bool)
    hit[3:73] = True
    out = op(query, x, *parameters)
    assert torch.equal(out[~hit], clean[~hit])
    assert out[hit].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_without_a_key_projection_x_is_the_key(dtype):
    lengths = [9, 0, 20]
    query, x, query_att, _, key_att, _, *norm = cast(tensors(lengths, 24, 3), dtype)
    identity = torch.eye(24, dtype=dtype)

    def call(weight):
        def op(query, x, query_att, key_att, *norm):
            return attention(query, x, query_att, weight, key_att, None, *norm, cu_of(lengths), 3, "direct", True)

        return checks.evaluate(op, [query, x, query_att, key_att, *norm])

    kernel_checks.assert_same_values(call(None), call(identity))


def test_parameters_are_optional():
    op = bind(attention, RAGGED, 3, "key_free", True)
    plain = bind(formula, RAGGED, 3, "key_free", True)
    inputs = cast(tensors(RAGGED, 24, 3)[:5], F32)
    pair = [lambda *given, f=f: f(*given, None, None, None) for f in (op, plain)]
    triton_accuracy.assert_accurate(*pair, inputs, 16)


@each_form
def test_a_forward_is_few_launches(form, launches):
    op, _, inputs = problem([70, 3], 24, 3, form)
    op(*cast(inputs, F32))
    pool = ["pool_chunk", "merge_chunks"]
    assert [launch.kernel for launch in launches] == [*pool, *pool, "row_norm_forward"]
