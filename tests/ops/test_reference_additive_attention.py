"""Reference of additive_attention against the official equations: both forms, both scorers, with and without norm."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, formulas
from .checks import BF16, F32, F64, RAGGED, affine, cu_of, randn

pytestmark = pytest.mark.usefixtures("reference")
each_form = pytest.mark.parametrize("form", ["direct", "key_free"])
each_scorer = pytest.mark.parametrize("scorer", ["dense", "per_head"])
each_sub_norm = pytest.mark.parametrize("sub_norm", [False, True])
NAMES = (
    "query", "x", "query_att", "key_weight", "key_att", "key_bias", "query_att_bias", "key_att_bias", "norm_weight",
    "norm_bias",
)  # fmt: skip
SCORER_BIASES = {f"gradient {NAMES.index(name)}" for name in ("query_att_bias", "key_att_bias")}


def bind(function, lengths, heads, longer=0, **options):
    """The op as a function of the tensors called NAMES; the last ones may be left out."""
    cu, longest = cu_of(lengths), max(lengths, default=0) + longer

    def call(query, x, query_att, key_weight, key_att, key_bias=None, *optional):
        more = dict(zip(NAMES[6:], optional, strict=False)) | options
        return function(query, x, query_att, key_weight, key_bias, key_att, cu, longest, heads, **more)

    return call


def tensors(lengths, width, heads, scorer="dense", sub_norm=True):
    """Inputs in the order of NAMES, logits of a few units; no parameters of the norm without norm."""
    tokens, columns = sum(lengths), width if scorer == "dense" else width // heads
    wide = (width / heads / columns) ** 0.5
    inputs = [randn(tokens, width), randn(tokens, width), randn(heads, columns, scale=wide)]
    inputs += [randn(width, width, scale=width**-0.5), randn(heads, columns, scale=2 * wide)]
    inputs += [randn(width), randn(heads), randn(heads)]
    return inputs + (affine(width) if sub_norm else [])


def pair(lengths, heads, form, sub_norm=True):
    """The op in this form and the formula."""
    op = bind(hk.additive_attention, lengths, heads, sub_norm=sub_norm, form=form)
    return op, bind(formulas.additive_attention, lengths, heads, sub_norm=sub_norm)


@each_sub_norm
@each_scorer
@each_form
@pytest.mark.parametrize(("lengths", "width", "heads"), checks.PROBLEMS, ids=str)
def test_exact_in_float64(lengths, width, heads, form, scorer, sub_norm):
    inputs = tensors(lengths, width, heads, scorer, sub_norm)
    # The product P = K o g of small numbers is normalized, which divides by its deviation: a factor of ten on top.
    checks.assert_exact(*pair(lengths, heads, form, sub_norm), inputs, 10 * checks.FLOAT64_BOUND)


@each_scorer
@each_form
def test_a_thousand_tokens(form, scorer):
    checks.assert_exact(*pair([1000], 4, form), tensors([1000], 64, 4, scorer), 10 * checks.FLOAT64_BOUND)


@pytest.mark.parametrize("given", [5, 6, 7, 9])
@each_form
def test_parameters_are_optional(form, given):
    inputs = tensors(RAGGED, 64, 4)[:given]
    checks.assert_exact(*pair(RAGGED, 4, form), inputs, 10 * checks.FLOAT64_BOUND)


@each_scorer
@each_sub_norm
def test_forms_agree(scorer, sub_norm):
    lengths = [40, 0, 33, 1]
    inputs = tensors(lengths, 192, 12, scorer, sub_norm)
    direct, key_free, auto = (
        checks.evaluate(pair(lengths, 12, form, sub_norm)[0], inputs) for form in ("direct", "key_free", "auto")
    )
    checks.assert_equal_to_rounding(key_free, direct)
    checks.assert_equal_to_rounding(auto, direct)


@each_form
@each_scorer
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_biases_of_the_scorers_have_a_gradient_of_exactly_zero(form, scorer, dtype):
    op, _ = pair(RAGGED, 4, form)
    values = checks.evaluate(op, [t.to(dtype) for t in tensors(RAGGED, 64, 4, scorer)])
    for name in SCORER_BIASES:
        assert torch.equal(values[name], torch.zeros(4, dtype=dtype))


@each_sub_norm
@each_form
@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_single_and_half_precision(form, sub_norm, dtype, parameter):
    lengths = [37, 0, 129, 1, 2]

    def draw():
        return *pair(lengths, 4, form, sub_norm), tensors(lengths, 64, 4, "dense", sub_norm)

    checks.assert_within_policy(draw, dtype, parameter, activations=2, rowwise=False)


@each_scorer
@each_form
def test_huge_logits(form, scorer):
    lengths = [7, 1, 30]
    inputs = tensors(lengths, 64, 4, scorer, sub_norm=False)
    inputs[2], inputs[4] = inputs[2] * 1e4, inputs[4] * 1e4
    # A logit of 1e4 has an error of 1e4 eps, which is the relative error of its exponential.
    checks.assert_exact(*pair(lengths, 4, form, False), inputs, 1e4 * checks.FLOAT64_BOUND)
    values = checks.evaluate(pair(lengths, 4, form, False)[0], [t.float() for t in inputs])
    assert all(v.isfinite().all() for v in values.values())


@each_form
@each_sub_norm
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths, form, sub_norm):
    op, _ = pair(lengths, 4, form, sub_norm)
    checks.assert_zero_gradients(op, tensors(lengths, 64, 4, "dense", sub_norm), (0, 64))


@each_form
@each_scorer
@each_sub_norm
def test_dead_rows_are_inert(form, scorer, sub_norm):
    op, _ = pair(RAGGED, 4, form, sub_norm)
    checks.assert_dead_rows_are_inert(op, tensors(RAGGED, 64, 4, scorer, sub_norm), 2)


@each_form
def test_equal_lengths_take_the_same_values_as_padding(form):
    lengths = [7, 7, 7]
    inputs = tensors(lengths, 64, 4)
    options = {"sub_norm": True, "form": form}
    tight, padded = (bind(hk.additive_attention, lengths, 4, longer, **options) for longer in (0, 5))
    checks.assert_equal_to_rounding(checks.evaluate(tight, inputs), checks.evaluate(padded, inputs))


@each_form
def test_sequences_do_not_see_each_other(form):
    lengths = [3, 4, 5]
    op, _ = pair(lengths, 4, form)
    query, x, *parameters = tensors(lengths, 64, 4)
    clean = op(query, x, *parameters)
    query[3:7] = x[3:7] = torch.nan
    others = [0, 1, 2, 7, 8, 9, 10, 11]
    assert torch.equal(op(query, x, *parameters)[others], clean[others])


@each_form
def test_strides_do_not_matter(form):
    checks.assert_strides_do_not_matter(pair(RAGGED, 4, form)[0], tensors(RAGGED, 64, 4))


@each_form
@each_scorer
def test_gradcheck(form, scorer):
    # All but the biases of the scorers, whose zero gradient has a test of its own, to keep the problem tiny.
    checks.assert_gradcheck(pair([2, 0, 3], 2, form)[0], tensors([2, 0, 3], 4, 2, scorer)[:6])


@pytest.mark.parametrize(("form", "scorer"), [("direct", "per_head"), ("key_free", "dense")])
def test_compiles(form, scorer):
    def function(*arguments):
        *given, cu, longest = arguments
        query, x, query_att, key_weight, key_att, key_bias, query_att_bias, key_att_bias, norm_weight, norm_bias = given
        return hk.additive_attention(
            query, x, query_att, key_weight, key_bias, key_att, cu, longest, 4,
            query_att_bias=query_att_bias, key_att_bias=key_att_bias, norm_weight=norm_weight,
            norm_bias=norm_bias, sub_norm=True, form=form,
        )  # fmt: skip

    batches = ([3, 4], [2, 0, 9, 30])
    checks.assert_compiles(function, [(tensors(b, 64, 4, scorer), (cu_of(b), max(b))) for b in batches])


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    heads=st.sampled_from([1, 2, 8]),
    scorer=st.sampled_from(["dense", "per_head"]),
    form=st.sampled_from(["auto", "direct", "key_free"]),
)
def test_any_lengths(lengths, heads, scorer, form):
    inputs = tensors(lengths, 16, heads, scorer)
    checks.assert_exact(*pair(lengths, heads, form), inputs, 100 * checks.FLOAT64_BOUND)


@each_scorer
def test_an_exported_op_takes_sequences_of_any_length(scorer):
    """The form is that of the example elsewhere: a choice by lengths is a guard on them."""
    heads, free = 2, torch.export.Dim.DYNAMIC
    query, x, *parameters = tensors([40] * 3, 16, heads, scorer, sub_norm=False)

    class Core(torch.nn.Module):
        def forward(self, query, x, cu):
            query_att, key_weight, key_att, *_ = parameters
            return hk.additive_attention(query, x, query_att, key_weight, None, key_att, cu, 40, heads)

    for strict in (False, True):
        program = torch.export.export(
            Core(), (query, x, cu_of([40] * 3)), dynamic_shapes=({0: free}, {0: free}, {0: free}), strict=strict
        )
        rows, cu = torch.randn(5, 16, dtype=query.dtype), cu_of([1, 4])
        expected = hk.additive_attention(rows, rows, parameters[0], parameters[1], None, parameters[2], cu, 40, heads)
        torch.testing.assert_close(program.module()(rows, rows, cu), expected)
