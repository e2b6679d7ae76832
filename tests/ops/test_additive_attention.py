"""additive_attention on the compiled kernels: forms, scorers, with and without norm."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hbert_kernels as hk
from hbert_kernels.ops.additive_attention import prefers_key_free

from . import checks, formulas, kernel_checks
from .checks import BF16, F32, RAGGED, cu_of
from .kernel_checks import assert_accurate, cast, each_dtype
from .test_reference_additive_attention import SCORER_BIASES, bind, each_form, each_scorer, each_sub_norm, pair, tensors

# The product P = K o g of small numbers is normalized, which divides by its deviation: a factor of ten on top.
BOUND = 10 * checks.FLOAT64_BOUND


def core(lengths, width, heads, form, scorer="dense", sub_norm=True, dtype=F32, parameter=None):
    """The op as a function of the tensors of the reference's tests, under the default dispatch, and these."""
    op, _ = pair(lengths, heads, form, sub_norm)
    return op, cast(tensors(lengths, width, heads, scorer, sub_norm), dtype, parameter, 2)


class Recorder(TorchDispatchMode):
    """The names of this library's ops that run inside the ``with`` block."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hbert_kernels":
            self.ops.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@each_form
@each_sub_norm
def test_the_default_dispatch_runs_the_compiled_kernels(form, sub_norm):
    op, inputs = core([5, 3], 24, 3, form, sub_norm=sub_norm)
    with Recorder() as recorder:
        kernel_checks.evaluate(op, inputs)
    assert recorder.ops == ["additive_attention", "additive_attention_backward"]
    with hk.use_backend("cpp"):
        assert torch.equal(op(*inputs), core([5, 3], 24, 3, form, sub_norm=sub_norm)[0](*inputs))


@each_sub_norm
@each_scorer
@each_form
@pytest.mark.parametrize(
    ("lengths", "width", "heads"),
    [([1], 64, 4), ([7], 8, 2), ([37, 0, 129], 24, 3), (RAGGED, 192, 12), ([3, 2], 768, 12), ([37, 2], 1000, 8)],
    ids=str,
)
def test_the_formula(lengths, width, heads, form, scorer, sub_norm):
    checks.assert_exact(*pair(lengths, heads, form, sub_norm), tensors(lengths, width, heads, scorer, sub_norm), BOUND)


@each_scorer
@each_form
def test_a_thousand_tokens(form, scorer):
    checks.assert_exact(*pair([1000], 4, form), tensors([1000], 64, 4, scorer), BOUND)


@each_sub_norm
@each_scorer
@each_form
@pytest.mark.parametrize(("dtype", "parameter"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
def test_single_and_half_precision(form, scorer, sub_norm, dtype, parameter):
    # The reference takes the same form: the kernels must not add to the errors of its GEMMs, which are the same.
    assert_accurate(*core([37, 0, 129, 1, 2], 64, 4, form, scorer, sub_norm, dtype, parameter))


@each_scorer
@each_sub_norm
@each_dtype
def test_forms_agree(dtype, scorer, sub_norm):
    lengths = [40, 0, 33, 1]
    inputs = core(lengths, 192, 12, "auto", scorer, sub_norm, dtype)[1]
    direct, key_free, auto = (pair(lengths, 12, form, sub_norm)[0](*inputs) for form in ("direct", "key_free", "auto"))
    # bfloat16: the key, which only the direct form has, is rounded to 2^-9, some of them add up.
    bound = {torch.float64: 1e-12, F32: 1e-5, BF16: 2**-5}[dtype]
    for other in (key_free, auto):
        assert (direct - other).abs().max() <= bound * direct.abs().max()


def test_the_form_is_chosen_by_the_mean_length():
    assert prefers_key_free(1000, 2)
    assert not prefers_key_free(20, 2)
    assert prefers_key_free(20, 2, "per_head")
    assert not prefers_key_free(15, 2, "per_head")
    cases = ([1000], "dense", "key_free"), ([9, 2], "dense", "direct"), ([9, 9], "per_head", "key_free")
    for lengths, scorer, form in cases:
        inputs = core(lengths, 24, 3, form, scorer)[1]
        assert torch.equal(pair(lengths, 3, "auto")[0](*inputs), pair(lengths, 3, form)[0](*inputs))


@each_form
@each_scorer
@each_dtype
def test_biases_of_the_scorers_have_a_gradient_of_exactly_zero(form, scorer, dtype):
    values = kernel_checks.evaluate(*core(RAGGED, 64, 4, form, scorer, dtype=dtype))
    for name in SCORER_BIASES:
        assert torch.equal(values[name], torch.zeros(4, dtype=dtype))


@each_scorer
@each_form
def test_large_logits(form, scorer):
    inputs = tensors([7, 1, 30], 64, 4, scorer, sub_norm=False)
    inputs[2], inputs[4] = inputs[2] * 1e4, inputs[4] * 1e4
    op, formula = pair([7, 1, 30], 4, form, False)
    checks.assert_exact(op, formula, inputs, 1e4 * checks.FLOAT64_BOUND)
    assert all(value.isfinite().all() for value in checks.evaluate(op, cast(inputs, F32)).values())


def test_parameters_of_an_absent_norm_have_no_gradients():
    x = torch.randn(5, 24, requires_grad=True)
    weight, bias, scorer = (torch.ones(*shape, requires_grad=True) for shape in ((24,), (24,), (3, 24)))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    options = {"norm_weight": weight, "norm_bias": bias, "sub_norm": False}
    hk.additive_attention(x, x, scorer, None, None, scorer, bounds, 3, 3, **options).sum().backward()
    assert weight.grad is None and bias.grad is None and x.grad is not None


@each_form
@each_sub_norm
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths, form, sub_norm):
    checks.assert_zero_gradients(*core(lengths, 64, 4, form, sub_norm=sub_norm), (0, 64))


@pytest.mark.parametrize("lengths", [[7] * 10_000, [70_000]], ids=["short", "one"])
def test_more_than_65536_rows(lengths):
    op, (query, x, *parameters) = core(lengths, 8, 2, "auto", dtype=torch.float64)
    last = lengths[-1]
    alone = bind(formulas.additive_attention, [last], 2, sub_norm=True)(query[-last:], x[-last:], *parameters)
    checks.assert_equal_to_rounding({"last": op(query, x, *parameters)[-last:]}, {"last": alone}, BOUND)


@each_form
@each_scorer
@each_sub_norm
def test_dead_rows_are_inert(form, scorer, sub_norm):
    op, inputs = core([*RAGGED, 100], 24, 3, form, scorer, sub_norm)
    checks.assert_dead_rows_are_inert(op, cast(inputs, torch.float64), 2)
    kernel_checks.assert_gradients_of_dead_rows_are_not_read(op, cast(inputs, torch.float64), 2)


@each_form
@each_sub_norm
def test_sequences_do_not_see_each_other(form, sub_norm):
    op, (query, x, *parameters) = core([3, 100, 5], 24, 3, form, sub_norm=sub_norm)
    clean = op(query, x, *parameters)
    query[3:103] = x[3:103] = torch.nan
    hit = torch.zeros(108, dtype=torch.bool)
    hit[3:103] = True
    out = op(query, x, *parameters)
    assert torch.equal(out[~hit], clean[~hit])
    assert out[hit].isnan().all()


@each_form
@each_dtype
def test_same_bits_from_run_to_run(form, dtype):
    op, inputs = core([30, 200, 0, 7], 192, 12, form, dtype=dtype)
    kernel_checks.assert_same_values(kernel_checks.evaluate(op, inputs), kernel_checks.evaluate(op, inputs))


@each_form
def test_strides_do_not_matter(form):
    checks.assert_strides_do_not_matter(*core([*RAGGED, 70], 24, 3, form, dtype=torch.float64))


@each_form
@each_scorer
def test_gradcheck(form, scorer):
    # All but the biases of the scorers, whose zero gradient has a test of its own, to keep the problem tiny.
    checks.assert_gradcheck(pair([2, 0, 3], 2, form)[0], tensors([2, 0, 3], 4, 2, scorer)[:6])


def test_more_than_64_heads_take_the_reference():
    op, formula = pair([9, 0, 3], 66, "key_free")
    inputs = tensors([9, 0, 3], 132, 66)
    explanation = hk.explain("additive_attention", *inputs[:3])
    assert explanation.startswith("additive_attention: reference runs")
    assert "cpp: has at most 64 heads, got 66" in explanation
    with hk.use_backend("cpp"), pytest.raises(hk.BackendError, match="has at most 64 heads, got 66"):
        op(*inputs)
    with hk.use_backend("reference"):
        expected = checks.evaluate(op, inputs)
    checks.assert_equal_to_rounding(checks.evaluate(formula, inputs), expected, BOUND)


@each_form
def test_compiles_without_graph_breaks_or_recompiles(form):
    def function(*arguments):
        *given, cu, longest = arguments
        query, x, query_att, key_weight, key_att, key_bias, *_, norm_weight, norm_bias = given
        return hk.additive_attention(
            query, x, query_att, key_weight, key_bias, key_att, cu, longest, 4, norm_weight=norm_weight,
            norm_bias=norm_bias, query_att_bias=given[6], key_att_bias=given[7], sub_norm=True, form=form,
        )  # fmt: skip

    batches = ([3, 4], [5, 0, 7], [2, 2, 9, 70])
    checks.assert_compiles(function, [(tensors(n, 64, 4), (cu_of(n), max(n))) for n in batches])


def test_compiles_with_inductor():
    op, inputs = core([9, 4], 24, 3, "key_free")
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(op, fullgraph=True)(*inputs), op(*inputs))


@each_form
def test_compiles_given_a_tensor_twice(form):
    def tied(x, att, key_weight):
        return hk.additive_attention(x, x, att, key_weight, None, att, cu_of([9, 4]), 9, 3, form=form)

    x, _, att, key_weight, *_ = tensors([9, 4], 24, 3)
    kernel_checks.assert_compiles_given_a_tensor_twice(tied, [x, att, key_weight])


@each_form
def test_autocast_with_activation_checkpointing(form):
    module, cu = hk.nn.AdditiveAttention(24, 3), cu_of([40, 2])
    parameters = [p for name, p in module.named_parameters() if name not in ("query_att.bias", "key_att.bias")]

    def block(x):
        return module.forward_packed(x, cu, 40)

    kernel_checks.assert_checkpointing_under_autocast_changes_no_bit(block, parameters, 42, 24, BF16)


@each_scorer
@each_sub_norm
@each_dtype
def test_without_a_key_projection_x_is_the_key(scorer, sub_norm, dtype):
    (query, key, query_att, _, key_att, *_, norm_weight, norm_bias) = tensors(RAGGED, 64, 4, scorer)
    norm = [norm_weight, norm_bias] if sub_norm else []
    inputs = cast([query, key, query_att, key_att, *norm], dtype, None, 2)
    varlen = cu_of(RAGGED), max(RAGGED), 4

    def call(function, weight, query, key, query_att, key_att, *norm):
        affine = dict(zip(("norm_weight", "norm_bias"), norm, strict=False))
        return function(query, key, query_att, weight, None, key_att, *varlen, sub_norm=sub_norm, **affine)

    identity = torch.eye(64, dtype=dtype)
    given = kernel_checks.evaluate(lambda *t: call(hk.additive_attention, None, *t), inputs)
    projected = kernel_checks.evaluate(lambda *t: call(hk.additive_attention, identity, *t), inputs)
    bound = BOUND if dtype == torch.float64 else 1e-3 if dtype == F32 else 2**-5
    checks.assert_equal_to_rounding(given, projected, bound)


def test_training_keeps_less_than_self_attention():
    """Bytes that autograd keeps for the backward of an A and an S layer's attention, with their projections."""
    tokens, width, heads = 512, 192, 6
    additive, cu = hk.nn.AdditiveAttention(width, heads), cu_of([128] * 4)
    qkv, out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def kept(function, modules):
        parameters = {p.data_ptr() for module in modules for p in module.parameters()}
        stored = {}

        def pack(t):
            if t.data_ptr() not in parameters:
                stored[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(tokens, width, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = function(x)
        result.sum().backward()
        return sum(stored.values())

    a = kept(lambda x: additive.forward_packed(x, cu, 128), [additive])
    s = kept(lambda x: out(hk.attention(qkv(x), cu, 128, heads)), [qkv, out])
    row = tokens * width * 4
    assert a < s
    assert a < 4.5 * row  # x, the query, the norm's output and what belongs to sequences and heads; never the key


@each_form
def test_opcheck(form):
    query, x, query_att, key_weight, key_att, key_bias, _, _, *norm = cast(tensors([3, 0, 5], 24, 3), F32)
    cu = cu_of([3, 0, 5])
    arguments = (query, x, query_att, key_att, cu, 3, key_weight, key_bias, form == "key_free", *norm, True)
    torch.library.opcheck(torch.ops.hbert_kernels.additive_attention, (*arguments, 1e-12))
    _, *saved = torch.ops.hbert_kernels.additive_attention(*arguments, 1e-12)
    backward = torch.ops.hbert_kernels.additive_attention_backward
    torch.library.opcheck(backward, (torch.randn_like(query), *arguments, *saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(query=a["query"][0]), r"x must be \[rows, width\]"),
        (lambda a: dict(query=a["query"].half()), "x must have the dtype of query"),
        (lambda a: dict(x=a["x"][1:]), r"x must be \[9, 24\]"),
        (lambda a: dict(num_heads=5), "heads must divide the width"),
        (lambda a: dict(key_att=a["key_att"][:, 1:]), r"key_att must be \[h, H\] or \[h, d\]"),
        (lambda a: dict(key_att=a["key_att"].bfloat16()), "key_att must have the compute dtype"),
        (lambda a: dict(query_att=a["query_att"].bfloat16()), "scorer must have the compute dtype"),
        (lambda a: dict(key_weight=a["key_weight"][1:]), r"key_weight must be \[24, 24\]"),
        (lambda a: dict(key_weight=None), "the K-free form needs key_weight"),
        (lambda a: dict(cu_seqlens=cu_of([4, 6])), "cu_seqlens reaches 10, but there are only 9 tokens"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    query, x, query_att, key_weight, key_att, key_bias, *_ = cast(tensors([4, 5], 24, 3), F32)
    arguments = dict(query=query, x=x, query_att=query_att, key_att=key_att, cu_seqlens=cu_of([4, 5]), num_heads=3)
    arguments |= dict(key_weight=key_weight, key_bias=key_bias, key_free=True, norm_weight=None, norm_bias=None)
    kernel_checks.assert_op_refuses("additive_attention", arguments | dict(sub_norm=True, eps=1e-12), change, message)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    heads=st.sampled_from([1, 2, 8]),
    scorer=st.sampled_from(["dense", "per_head"]),
    form=st.sampled_from(["auto", "direct", "key_free"]),
)
def test_any_lengths(lengths, heads, scorer, form):
    checks.assert_exact(*pair(lengths, heads, form), tensors(lengths, 16, heads, scorer), 10 * BOUND)
