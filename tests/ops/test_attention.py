"""attention through the whole chain: public function, autograd, op, compiled kernel."""

import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import hbert_kernels as hk
from hbert_kernels import _dispatch
from hbert_kernels._accuracy import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


MODULE = sys.modules[hk.attention.__module__]


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    """Every test here is about the compiled kernel: none may pass on the reference path, at no level."""
    monkeypatch.setattr(MODULE, "_SCALAR", False)
    with hk.use_backend("cpp"):
        yield


def problem(lengths, num_heads, head_size, dtype=torch.float32, dead=0):
    """qkv, cu_seqlens and the longest length; ``dead`` rows of NaN follow the last sequence."""
    qkv = torch.randn(sum(lengths), 3 * num_heads * head_size, dtype=torch.float64).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat([qkv, qkv.new_full((dead, qkv.shape[1]), float("nan"))]), cu_seqlens, max(lengths, default=0)


def assert_accurate(lengths, num_heads, head_size, dtype=torch.float32, scale=1.0):
    qkv, cu_seqlens, longest = problem(lengths, num_heads, head_size, dtype)
    results = compare(lambda x: hk.attention(x, cu_seqlens, longest, num_heads), [qkv * scale], "cpp")
    failed = [result for result in results if not result.passed]
    assert not failed, failed


def textbook(qkv, lengths, num_heads):
    """One head of one sequence after the other, by the formula."""
    outputs = []
    for rows in qkv.split(lengths):
        query, key, value = rows.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 37, 129, 300])
def test_accurate_at_odd_lengths(length, dtype):
    assert_accurate([length], 2, 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [1, 2, 5, 8, 24, 40, 72, 80, 128, 200])
def test_accurate_at_any_head_size(head_size, dtype):
    assert_accurate([37, 70], 2, head_size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accurate_over_many_blocks_of_keys(dtype):
    assert_accurate([1000, 3, 517], 1, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[0], [0, 5, 0, 0, 9, 0], [1, 1, 1], [128] * 4], ids=str)
def test_empty_and_short_sequences(lengths, dtype):
    assert_accurate(lengths, 3, 8, dtype)


def test_the_formula():
    lengths, heads = [33, 1, 7], 4
    qkv, cu_seqlens, longest = problem(lengths, heads, 24, torch.float64)
    qkv.requires_grad_()
    actual, expected = hk.attention(qkv, cu_seqlens, longest, heads), textbook(qkv, lengths, heads)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, qkv, cotangent)[0] for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype):
    # Scores of some 1e4: the exponentials overflow and underflow unless the maximum is taken off.
    assert_accurate([70, 300], 2, 64, dtype, scale=40.0)


def test_a_rising_maximum_over_blocks():
    qkv, cu_seqlens, longest = problem([1000], 1, 8)
    qkv[:, 8:16] *= torch.linspace(0, 30, 1000)[:, None]
    results = compare(lambda x: hk.attention(x, cu_seqlens, longest, 1), [qkv], "cpp")
    assert all(result.passed for result in results), results


@pytest.mark.parametrize("head_size", [32, 96])
def test_a_single_token_has_all_the_weight_backward_too(head_size):
    """The scale is no power of two: the backward has to round the score as the forward did."""
    qkv, cu_seqlens, longest = problem([1] * 64, 2, head_size)
    qkv = (10 * qkv).requires_grad_()
    hk.attention(qkv, cu_seqlens, longest, 2).sum().backward()
    dvalues = qkv.grad[:, 4 * head_size :]
    assert torch.equal(dvalues, torch.ones_like(dvalues))


def test_log_sum_exp():
    qkv, cu_seqlens, longest = problem([300, 5], 2, 16)
    _, log_sum_exp = torch.ops.hbert_kernels.attention(qkv, cu_seqlens, longest, 2)
    query, key, _ = qkv[:300].double().unflatten(1, (3, 2, 16)).permute(1, 2, 0, 3)
    expected = (query @ key.transpose(1, 2) / 4).logsumexp(-1)
    torch.testing.assert_close(log_sum_exp[:, :300].double(), expected, rtol=1e-6, atol=1e-6)


def test_many_tokens():
    lengths = [17] * 4000
    qkv, cu_seqlens, longest = problem(lengths, 1, 8)
    torch.testing.assert_close(hk.attention(qkv, cu_seqlens, longest, 1)[-34:], textbook(qkv[-34:], [17, 17], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dead_rows_are_zero_and_never_read(dtype):
    qkv, cu_seqlens, longest = problem([5, 0, 30], 2, 24, dtype, dead=200)
    qkv.requires_grad_()
    out = hk.attention(qkv, cu_seqlens, longest, 2)
    out.backward(torch.where(torch.arange(235)[:, None] < 35, torch.ones_like(out), float("nan")))
    alive = qkv.detach()[:35].clone().requires_grad_()
    expected = hk.attention(alive, cu_seqlens, longest, 2)
    expected.sum().backward()
    assert torch.equal(out, torch.cat([expected, expected.new_zeros(200, 48)]))
    assert torch.equal(qkv.grad, torch.cat([alive.grad, alive.grad.new_zeros(200, 144)]))


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths):
    qkv, cu_seqlens, _ = problem(lengths, 2, 8)
    qkv.requires_grad_()
    out = hk.attention(qkv, cu_seqlens, 0, 2)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert qkv.grad.shape == (0, 48)


def test_non_contiguous_input():
    qkv, cu_seqlens, longest = problem([40, 9], 2, 16)
    wide = torch.randn(49, 192)
    wide[:, ::2] = qkv
    leaves = [qkv.clone().requires_grad_(), wide.clone().requires_grad_()]
    outputs = [hk.attention(leaf, cu_seqlens, longest, 2) for leaf in (leaves[0], leaves[1][:, ::2])]
    assert torch.equal(*outputs)
    for out in outputs:
        out.backward(torch.ones(32, 49).t())
    assert torch.equal(leaves[0].grad, leaves[1].grad[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_threads_the_neighbours_and_the_run(dtype):
    lengths = [30, 300, 0, 7]
    qkv, cu_seqlens, longest = problem(lengths, 3, 40, dtype)
    cotangent = torch.randn(337, 120).to(dtype)

    def everything(qkv, cotangent, cu_seqlens):
        leaf = qkv.clone().requires_grad_()
        out = hk.attention(leaf, cu_seqlens, longest, 3)
        return out, torch.autograd.grad(out, leaf, cotangent)[0]

    together = everything(qkv, cotangent, cu_seqlens)
    torch.set_num_threads(1)
    for one, two in zip(together, everything(qkv, cotangent, cu_seqlens), strict=True):
        assert torch.equal(one, two)
    rows = slice(30, 330)
    alone = everything(qkv[rows], cotangent[rows], torch.tensor([0, 300], dtype=torch.int32))
    for one, two in zip(together, alone, strict=True):
        assert torch.equal(one[rows], two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [3, 20, 40])
def test_nan_stays_in_its_sequence_and_head(where, dtype):
    qkv, cu_seqlens, longest = problem([10, 9, 12], 2, 8, dtype)
    clean = hk.attention(qkv, cu_seqlens, longest, 2)
    qkv[14, where] = float("nan")  # head 0 of the queries, head 0 of the keys, head 1 of the values: of one token
    out = hk.attention(qkv, cu_seqlens, longest, 2)
    hit = torch.zeros(31, 16, dtype=torch.bool)
    hit[14 if where == 3 else slice(10, 19), slice(8, 9) if where == 40 else slice(0, 8)] = True
    assert out[hit].isnan().all()
    assert torch.equal(out[~hit], clean[~hit])


def test_dropout_is_refused_in_words():
    qkv, cu_seqlens, longest = problem([5], 2, 8)
    with pytest.raises(hk.BackendError, match="no dropout of attention weights, and dropout_p is 0.5"):
        hk.attention(qkv, cu_seqlens, longest, 2, dropout_p=0.5)


def test_the_scalar_level_leaves_single_precision_to_torch(monkeypatch):
    monkeypatch.setattr(MODULE, "_SCALAR", True)
    qkv, cu_seqlens, longest = problem([5], 2, 8)
    assert "cpp: is 4 to 10 times slower than torch's attention" in hk.explain("attention", qkv)
    with pytest.raises(hk.BackendError, match="without vector code"):
        hk.attention(qkv, cu_seqlens, longest, 2)
    assert hk.attention(qkv.double(), cu_seqlens, longest, 2).dtype == torch.float64


def test_dropout_takes_the_reference(monkeypatch):
    monkeypatch.setattr(_dispatch, "_fallbacks_told", set())
    qkv, cu_seqlens, longest = problem([50], 2, 8)
    with hk.use_backend("auto"), pytest.warns(UserWarning, match="attention runs on the reference path"):
        out = hk.attention(qkv, cu_seqlens, longest, 2, dropout_p=0.5)
    assert not torch.allclose(out, hk.attention(qkv, cu_seqlens, longest, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    qkv, cu_seqlens, longest = problem([5, 0, 9], 2, 24, dtype)
    namespace = torch.ops.hbert_kernels
    torch.library.opcheck(namespace.attention.default, (qkv, cu_seqlens, longest, 2))
    out, log_sum_exp = namespace.attention(qkv, cu_seqlens, longest, 2)
    inputs = (torch.randn_like(out), qkv, out, log_sum_exp, cu_seqlens, longest, 2)
    torch.library.opcheck(namespace.attention_backward.default, inputs)


def test_gradcheck():
    qkv, cu_seqlens, longest = problem([3, 0, 4], 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: hk.attention(x, cu_seqlens, longest, 2), [qkv.requires_grad_()])


def test_compiles_without_graph_breaks_or_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(qkv, cu_seqlens, longest):
        return hk.attention(qkv, cu_seqlens, longest, 2)

    for lengths in ([5, 4], [9, 1, 30], [64, 64, 64, 64]):
        qkv, cu_seqlens, longest = problem(lengths, 2, 16)
        qkv.requires_grad_()
        outputs = step(qkv, cu_seqlens, longest), hk.attention(qkv, cu_seqlens, longest, 2)
        assert torch.equal(*outputs)
        assert torch.equal(*(torch.autograd.grad(out.sum(), qkv)[0] for out in outputs))
    assert counter.frame_count == 1


def test_compiles_with_inductor():
    torch._dynamo.reset()
    qkv, cu_seqlens, longest = problem([5, 9], 2, 16)
    qkv.requires_grad_()
    compiled = torch.compile(hk.attention, fullgraph=True)
    out = compiled(qkv, cu_seqlens, longest, 2)
    assert torch.equal(out, hk.attention(qkv, cu_seqlens, longest, 2))
    out.square().sum().backward()
    assert qkv.grad.isfinite().all()


def test_autocast_with_activation_checkpointing():
    linear = torch.nn.Linear(16, 48)
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)

    def block(x):
        out = hk.attention(linear(x), cu_seqlens, 4, 2)
        assert out.dtype == torch.bfloat16
        return out.float().square().mean()

    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = torch.ones(6, 16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(x)
        loss.backward()
        gradients.append([x.grad, linear.weight.grad])
        linear.zero_grad()
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    num_heads=st.integers(1, 4),
    head_size=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 5.0]),
)
def test_accurate_for_any_shape(lengths, num_heads, head_size, dtype, scale):
    assert_accurate(lengths, num_heads, head_size, dtype, scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(qkv=a["qkv"][:, :-1]), "qkv must be"),
        (lambda a: a.update(qkv=a["qkv"][0]), "qkv must be"),
        (lambda a: a.update(qkv=a["qkv"].half()), "qkv must be float32"),
        (lambda a: a.update(num_heads=0), "qkv must be"),
        (lambda a: a.update(cu_seqlens=a["cu_seqlens"].long()), "cu_seqlens must be int32"),
        (lambda a: a.update(cu_seqlens=a["cu_seqlens"] + 1), "cu_seqlens must start at 0"),
        (lambda a: a.update(cu_seqlens=a["cu_seqlens"].flip(0)), "cu_seqlens must start at 0, got 9"),
        (lambda a: a.update(cu_seqlens=a["cu_seqlens"] * 2), "reaches 18, but there are only 9 tokens"),
        (lambda a: a.update(dout=a["dout"][:-1]), "dout must be"),
        (lambda a: a.update(out=a["out"].double()), "out must be"),
        (lambda a: a.update(log_sum_exp=a["log_sum_exp"].t()), "log_sum_exp must be"),
    ],
)
def test_the_op_itself_refuses_what_does_not_fit(change, message):
    qkv, cu_seqlens, longest = problem([4, 5], 2, 8)
    out, log_sum_exp = torch.ops.hbert_kernels.attention(qkv, cu_seqlens, longest, 2)
    inputs = dict(dout=out, qkv=qkv, out=out, log_sum_exp=log_sum_exp, cu_seqlens=cu_seqlens)
    change(arguments := inputs | dict(max_seqlen=longest, num_heads=2))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hbert_kernels.attention_backward(**arguments)
