"""additive_pool through the whole chain: public function, autograd, op, compiled kernel."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import hbert_kernels as hk

from . import checks, formulas, kernel_checks
from .checks import BF16, F32, F64, RAGGED, cu_of
from .kernel_checks import LENGTHS, SIZES, assert_accurate, cast, each_dtype
from .kernel_checks import compiled_kernels as compiled_kernels
from .test_reference_additive_pool import bind, each_output, each_scorer, problem

each_pair = pytest.mark.parametrize(
    ("scorer", "output"), [("dense", "slice"), ("per_sequence", "full"), ("per_head", "slice"), ("per_head", "full")]
)


def pool(lengths, width, heads, scorer="dense", output="slice", dtype=F32, parameter=None, logits=1.0):
    """The op as a function of x and the scorer, and these.

    The scorer is flat: by that the policy knows what has gradients that are sums over the rows.
    """
    op, _, inputs = problem(lengths, width, heads, scorer, output, logits)
    x, vectors = cast(inputs, dtype, parameter)
    return lambda x, flat: op(x, flat.reshape(vectors.shape)), [x, vectors.flatten()]


@each_dtype
@each_pair
@pytest.mark.parametrize(("width", "heads"), SIZES)
def test_accurate_at_odd_sizes(width, heads, scorer, output, dtype):
    for lengths in (*LENGTHS[:-1], RAGGED):
        assert_accurate(*pool(lengths, width, heads, scorer, output, dtype))


@each_dtype
@each_pair
@pytest.mark.parametrize(("width", "heads"), [(24, 3), (192, 12)])
def test_accurate_over_a_thousand_tokens(width, heads, scorer, output, dtype):
    assert_accurate(*pool([1000, 65, 64, 63], width, heads, scorer, output, dtype))


@each_scorer
@each_output
@pytest.mark.parametrize("lengths", [[1], [129, 0, 64, 65], RAGGED], ids=str)
def test_the_formula(lengths, scorer, output):
    checks.assert_exact(*problem(lengths, 60, 5, scorer, output))


@each_scorer
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 30, 60])
def test_any_number_of_heads(heads, scorer):
    checks.assert_exact(*problem([9, 0, 70], 60, heads, scorer, "slice"))
    checks.assert_exact(*problem([9, 0, 70], 60, heads, scorer, "full"))


@each_output
def test_a_scorer_per_head_is_a_block_diagonal_dense_one(output):
    per_head, (x, vectors) = pool([9, 0, 70], 60, 5, "per_head", output)
    dense, _ = pool([9, 0, 70], 60, 5, "dense", output)
    torch.testing.assert_close(dense(x, torch.block_diag(*vectors.view(5, 1, 12)).flatten()), per_head(x, vectors))


@each_scorer
@pytest.mark.parametrize("parameter", [F32, BF16], ids=str)
@pytest.mark.parametrize("x", [F32, BF16], ids=str)
def test_mixed_dtypes(x, parameter, scorer):
    op, inputs = pool([37, 0, 70], 60, 5, scorer, "full", x, parameter)
    assert_accurate(op, inputs)
    assert op(*inputs).dtype == F32


@each_dtype
@each_pair
def test_large_logits(scorer, output, dtype):
    # The exponentials overflow and underflow unless the maximum is taken off.
    op, inputs = pool([70, 1, 0, 30], 64, 4, scorer, output, dtype, logits=1e4)
    assert_accurate(op, inputs, 1e4 * checks.FLOAT64_BOUND)


@pytest.mark.parametrize("lengths", [[200], [8, 64]], ids=str)
def test_a_rising_maximum(lengths):
    # Each block of rows finds a larger score than all before it.
    op, formula, (x, scorer) = problem(lengths, 24, 3, "dense", "slice")
    x = x.abs() * torch.linspace(1, 30, len(x))[:, None]
    checks.assert_exact(op, formula, [x, scorer.abs()], 200 * checks.FLOAT64_BOUND)
    actual, expected = op(x.float(), scorer.abs().float()), formula(x, scorer.abs())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)  # scores of 200: errors of 200 eps


def test_large_means():
    # Scores of 1e4 have errors that are the relative errors of their exponentials, in the plain computation too.
    for dtype in (F32, BF16):
        op, (x, scorer) = pool([20, 17], 64, 4, dtype=dtype)
        assert_accurate(lambda x, op=op, scorer=scorer: op(x, scorer.to(x.dtype)), [x + 1e4])


@each_dtype
@each_scorer
def test_a_single_token_pools_to_itself(scorer, dtype):
    op, (x, vectors) = pool([1, 1], 64, 4, scorer, "slice", dtype, logits=1e4)
    values = kernel_checks.evaluate(op, [x, vectors])
    assert torch.equal(values["output 0"], x.to(values["output 0"].dtype))
    assert torch.equal(values["gradient 1"], torch.zeros_like(vectors))


@pytest.mark.parametrize("head_dim", [32, 96])
def test_a_single_token_has_all_the_weight_backward_too(head_dim):
    """The scale is no power of two: the backward has to round the score as the forward did."""
    x = (20 * torch.randn(64, 4 * head_dim)).requires_grad_()
    hk.additive_pool(x, torch.randn(4, 4 * head_dim), cu_of([1] * 64), 1, 4).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_statistics_of_the_softmax():
    (x, scorer), cu = pool([5, 0, 150], 24, 3)[1], cu_of([5, 0, 150])
    _, softmax = torch.ops.hbert_kernels.additive_pool(x, scorer.view(3, 24), cu, 3, False, 0.5)
    for b, rows in enumerate(formulas.sequences(cu)):
        scores = x[rows].double() @ scorer.view(3, 24).double().t() / 2
        largest = scores.amax(0) if len(scores) else torch.zeros(3)
        torch.testing.assert_close(softmax[b, 0].double(), largest.double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(softmax[b, 1].double(), (scores - largest).exp().sum(0), rtol=1e-5, atol=0)


@each_pair
@pytest.mark.parametrize("lengths", [[7] * 10_000, [1] * 70_000, [70_000]], ids=["short", "single", "one"])
def test_more_than_65536_rows(lengths, scorer, output):
    assert_accurate(*pool(lengths, 8, 2, scorer, output))


@each_scorer
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths, scorer):
    checks.assert_zero_gradients(*pool(lengths, 64, 4, scorer, "slice"), (len(lengths), 64))
    checks.assert_zero_gradients(*pool(lengths, 64, 4, scorer, "full"), (len(lengths), 4, 64))


@each_pair
@each_dtype
def test_dead_rows_are_inert(dtype, scorer, output):
    checks.assert_dead_rows_are_inert(*pool([*RAGGED, 100], 24, 3, scorer, output, dtype), 1)


@each_scorer
def test_only_dead_rows(scorer):
    op, (_, vectors) = pool([0, 0], 24, 3, scorer)
    checks.assert_zero_gradients(op, [torch.full((3, 24), torch.nan), vectors], (2, 24))


@each_pair
@each_dtype
def test_strides_do_not_matter(dtype, scorer, output):
    checks.assert_strides_do_not_matter(*pool([*RAGGED, 70], 24, 3, scorer, output, dtype))


@each_pair
@each_dtype
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(dtype, scorer, output):
    lengths = [30, 200, 0, 7, 65]
    op, _, inputs = problem(lengths, 192, 4, scorer, output)
    x, vectors = cast(inputs, dtype)
    kernel_checks.assert_same_bits_for_any_threads_and_run(op, [x, vectors])
    own, shared = ([vectors], []) if scorer == "per_sequence" else ([], [vectors])
    kernel_checks.assert_neighbours_change_no_bit(
        lambda n: bind(hk.additive_pool, n, 4, output), lengths, [x], own, shared
    )


@each_pair
@each_dtype
def test_nan_stays_in_its_sequence(dtype, scorer, output):
    op, inputs = pool([10, 9, 12], 40, 4, scorer, output, dtype)
    kernel_checks.assert_nan_stays(op, inputs, 14, slice(1, 2), slice(10, 19))


def test_more_than_64_heads_take_the_reference(monkeypatch):
    monkeypatch.setattr("hbert_kernels._dispatch._fallbacks_told", set())
    op, formula, (x, scorer) = problem([9, 0, 3], 130, 65, "dense", "slice")
    assert "cpp: has at most 64 heads, got 65" in hk.explain("additive_pool", x, scorer)
    with pytest.raises(hk.BackendError, match="has at most 64 heads, got 65"):
        op(x, scorer)
    with hk.use_backend("auto"), pytest.warns(UserWarning, match="additive_pool runs on the reference path"):
        checks.assert_exact(op, formula, [x, scorer])
    with pytest.raises(RuntimeError, match="heads must divide the width and be at most 64"):
        torch.ops.hbert_kernels.additive_pool(x, scorer, cu_of([9, 0, 3]), 65, False, 1.0)


@each_dtype
@each_pair
def test_opcheck(scorer, output, dtype):
    cu, (x, vectors) = cu_of([4, 0, 5]), cast(problem([4, 0, 5], 24, 3, scorer, output)[2], dtype)
    vectors = vectors.to(F64 if dtype == F64 else F32)
    namespace, options = torch.ops.hbert_kernels, (3, output == "full", 0.5)
    torch.library.opcheck(namespace.additive_pool.default, (x, vectors, cu, *options))
    pooled, softmax = namespace.additive_pool(x, vectors, cu, *options)
    backward = (torch.randn_like(pooled), x, vectors, cu, pooled, softmax, *options)
    torch.library.opcheck(namespace.additive_pool_backward.default, backward)


@each_output
@each_scorer
def test_gradcheck(scorer, output):
    op, _, inputs = problem([2, 0, 3], 4, 2, scorer, output)
    checks.assert_gradcheck(op, inputs)


@each_scorer
def test_compiles_without_graph_breaks_or_recompiles(scorer):
    def both(x, vectors, cu, longest):
        return tuple(hk.additive_pool(x, vectors, cu, longest, 4, output=output) for output in ("slice", "full"))

    batches = ([3, 4], [5, 0, 7], [2, 70, 9, 1])
    calls = [(cast(problem(n, 64, 4, scorer, "slice")[2], F32), (cu_of(n), max(n))) for n in batches]
    checks.assert_compiles(both, calls)


def test_compiles_with_inductor():
    kernel_checks.assert_compiles_with_inductor(*pool([3, 4], 40, 4))


def test_autocast_with_activation_checkpointing():
    linear, scorer, cu = torch.nn.Linear(40, 24), torch.randn(3, 24, requires_grad=True), cu_of([4, 2])
    kernel_checks.assert_checkpointing_under_autocast_changes_no_bit(
        lambda x: hk.additive_pool(linear(x), scorer, cu, 4, 3), [linear.weight, scorer], 6, 40, F32
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    heads=st.integers(1, 9),
    head_dim=st.integers(1, 40),
    scorer=st.sampled_from(["dense", "per_sequence", "per_head"]),
    output=st.sampled_from(["slice", "full"]),
    dtype=st.sampled_from([F32, BF16]),
)
def test_accurate_for_any_lengths(lengths, heads, head_dim, scorer, output, dtype):
    assert_accurate(*pool(lengths, heads * head_dim, heads, scorer, output, dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(x=a["x"][0]), r"x must be \[rows, width\]"),
        (lambda a: dict(x=a["x"].half()), "x must be float32, bfloat16 or float64"),
        (lambda a: dict(scorer=a["scorer"][1:]), r"scorer must be \[h, H\] or \[h, d\], or one"),
        (lambda a: dict(scorer=a["scorer"][:, 1:]), "scorer must be"),
        (lambda a: dict(scorer=a["scorer"][0]), "scorer must be"),
        (lambda a: dict(scorer=a["scorer"].expand(3, 3, 24)), "scorer must be"),
        (lambda a: dict(scorer=a["scorer"].bfloat16()), "scorer must have the compute dtype"),
        (lambda a: dict(num_heads=5), "heads must divide the width"),
        (lambda a: dict(num_heads=0), "heads must divide the width"),
        (lambda a: dict(dpooled=a["dpooled"][1:]), "pooled and dpooled must have the shape and dtype of the output"),
        (lambda a: dict(pooled=a["pooled"].double()), "pooled and dpooled must have the shape and dtype of the output"),
        (lambda a: dict(full=True), "pooled and dpooled must have the shape and dtype of the output"),
        (lambda a: dict(softmax=a["softmax"][1:]), r"softmax must be \[B, 2, h\] in the compute dtype"),
        (lambda a: dict(softmax=a["softmax"].double()), r"softmax must be \[B, 2, h\] in the compute dtype"),
        (lambda a: dict(cu_seqlens=a["cu_seqlens"].long()), r"cu_seqlens must be int32 \[B\+1\]"),
        (lambda a: dict(cu_seqlens=a["cu_seqlens"] + 1), "cu_seqlens must start at 0, got 1"),
        (lambda a: dict(cu_seqlens=cu_of([6, -2])), r"must not decrease, but cu_seqlens\[1\] = 6 > 4"),
        (lambda a: dict(cu_seqlens=cu_of([4, 6])), "cu_seqlens reaches 10, but there are only 9 tokens"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    cu, (x, scorer) = cu_of([4, 5]), cast(problem([4, 5], 24, 3, "dense", "slice")[2], F32)
    pooled, softmax = torch.ops.hbert_kernels.additive_pool(x, scorer, cu, 3, False, 1.0)
    arguments = dict(dpooled=pooled, x=x, scorer=scorer, cu_seqlens=cu, pooled=pooled, softmax=softmax)
    arguments |= dict(num_heads=3, full=False, scale=1.0)
    kernel_checks.assert_op_refuses("additive_pool_backward", arguments, change, message)
