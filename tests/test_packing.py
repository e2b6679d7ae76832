"""Packing: the packed and the static form of every pattern of padding, and back."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hbert_kernels import Packing

PATTERNS = {
    "right padding": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left padding": [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]],
    "empty rows": [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
    "all valid": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "nothing valid": [[0, 0, 0], [0, 0, 0]],
    "one row": [[1, 0, 1, 1, 0, 1, 0]],
    "no rows": torch.empty(0, 5),
    "no columns": torch.empty(2, 0),
}
each_pattern = pytest.mark.parametrize("mask", [torch.as_tensor(p).bool() for p in PATTERNS.values()], ids=PATTERNS)
each_form = pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])


def assert_describes(packing, mask, static):
    """The fields, from the lists of valid columns of each row."""
    batch, length = mask.shape
    columns = [[n for n in range(length) if mask[b, n]] for b in range(batch)]
    lengths = [len(c) for c in columns]
    dead = batch * length - sum(lengths) if static else 0
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(batch + 1)]
    assert packing.shape == (batch, length)
    assert isinstance(packing.max_seqlen, int)
    assert max(lengths, default=0) <= packing.max_seqlen <= length
    assert packing.positions.dtype == torch.int64
    assert packing.positions.tolist() == [rank for n in lengths for rank in range(n)] + [0] * dead
    x = torch.randn(batch, length, 3)
    rows = [x[b, n] for b, c in enumerate(columns) for n in c] + [torch.zeros(3)] * dead
    assert torch.equal(packing.pack(x), torch.stack(rows) if rows else torch.zeros(0, 3))
    assert torch.equal(packing.unpack(packing.pack(x)), torch.where(mask[..., None], x, 0))


@each_form
@each_pattern
def test_every_pattern(mask, static):
    assert_describes(Packing.from_mask(mask, static=static), mask, static)


@each_pattern
def test_the_packed_form_is_the_default_and_tight(mask):
    packing = Packing.from_mask(mask)
    assert_describes(packing, mask, static=False)
    if mask.numel():
        assert packing.max_seqlen == int(mask.sum(1).max())


@each_form
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(bits=st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n))))
def test_any_pattern(bits, static):
    mask = torch.tensor(bits, dtype=torch.bool).view(len(bits), -1 if bits else 4)
    assert_describes(Packing.from_mask(mask, static=static), mask, static)


@pytest.mark.parametrize(("batch", "length"), [(3, 5), (1, 1), (0, 4), (2, 0)])
def test_full(batch, length):
    assert_describes(Packing.full(batch, length), torch.ones(batch, length, dtype=torch.bool), static=False)


@each_form
@each_pattern
@pytest.mark.parametrize("trailing", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_any_trailing_shape_and_dtype(mask, static, trailing, dtype):
    packing = Packing.from_mask(mask, static=static)
    x = torch.randn(*mask.shape, *trailing).mul(8).to(dtype)
    packed = packing.pack(x)
    assert packed.shape == (len(packing.positions), *trailing)
    back = packing.unpack(packed)
    assert back.dtype == packed.dtype == dtype
    assert torch.equal(back, x * mask.view(*mask.shape, *[1] * len(trailing)))


@each_form
@each_pattern
def test_gradients(mask, static):
    packing = Packing.from_mask(mask, static=static)
    x = torch.randn(*mask.shape, 3, requires_grad=True)
    factor = torch.randn(len(packing.positions), 3)
    cotangent = torch.randn(*mask.shape, 3)
    (gradient,) = torch.autograd.grad(packing.unpack(packing.pack(x) * factor), x, cotangent)
    dense_factor = packing.unpack(factor)
    assert torch.equal(gradient, torch.where(mask[..., None], cotangent * dense_factor, 0))


@each_form
def test_garbage_under_the_mask_and_in_dead_rows_disappears(static):
    mask = torch.tensor(PATTERNS["holes"]).bool()
    packing = Packing.from_mask(mask, static=static)
    x = torch.randn(3, 4, 5)
    dirty = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    packed = packing.pack(dirty)
    assert torch.equal(packed, packing.pack(x))
    weight = torch.randn(5, 5, requires_grad=True)
    gradients = torch.autograd.grad((packed @ weight).square().sum(), [dirty, weight])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][~mask].any()
    alive = (torch.arange(len(packed)) < packing.cu_seqlens[-1])[:, None]
    rows = torch.where(alive, packed.detach(), torch.nan).requires_grad_()
    out = packing.unpack(rows)
    assert torch.equal(out, torch.where(mask[..., None], x, 0))
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert torch.equal(gradient, alive.float().expand_as(gradient))


@pytest.mark.parametrize("dead", [0, 3])
@pytest.mark.parametrize("lengths", [[3, 0, 2], [1], [], [0, 0], [0, 4]], ids=str)
def test_from_cu_seqlens(lengths, dead):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packing = Packing.from_cu_seqlens(cu, max(lengths, default=0), sum(lengths) + dead)
    assert packing.positions.dtype == torch.int64
    assert packing.positions.tolist() == [rank for n in lengths for rank in range(n)] + [0] * dead
    assert packing.cu_seqlens is cu
    assert packing.shape is None
    with pytest.raises(ValueError, match="came packed"):
        packing.unpack(torch.randn(sum(lengths) + dead, 2))
    with pytest.raises(ValueError, match="Packing.pack: expected"):
        packing.pack(torch.randn(2, 3, 2))


def test_bad_input():
    with pytest.raises(TypeError, match="mask must be bool .*got torch.int64"):
        Packing.from_mask(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must be \[B, N\], got shape \(3,\)"):
        Packing.from_mask(torch.ones(3, dtype=torch.bool))
    packing = Packing.from_mask(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected a tensor \[B, N, ...\] with \(B, N\) = \(2, 3\), got \(3, 2, 4\)"):
        packing.pack(torch.randn(3, 2, 4))
    with pytest.raises(AttributeError):
        packing.max_seqlen = 7


@pytest.mark.parametrize("static", [None, True])
def test_compiles_without_graph_breaks(static):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def double_the_first_token(x, mask):
        packing = Packing.from_mask(mask, static=static)
        rows = packing.pack(x)
        return packing.unpack(torch.where(packing.positions[:, None] == 0, 2 * rows, rows)), packing.cu_seqlens

    for batch, length in ((2, 5), (3, 4), (7, 9)):
        x, mask = torch.randn(batch, length, 3, requires_grad=True), torch.rand(batch, length) < 0.6
        first = mask & (mask.cumsum(1) == 1)
        factor = (mask.float() + first.float())[..., None]
        out, cu = double_the_first_token(x, mask)
        assert torch.equal(out, x * factor)
        assert cu.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], factor.expand_as(x))


def test_the_packed_form_cannot_be_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(lambda m: Packing.from_mask(m, static=False).cu_seqlens, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="while compiling use static=True"):
        compiled(torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_a_mask_without_values_is_packed_statically(mode):
    with mode():
        mask = torch.zeros(2, 3, dtype=torch.bool)
        assert Packing.from_mask(mask).positions.shape == (6,)
        with pytest.raises(ValueError, match="use static=True, also for meta and fake masks"):
            Packing.from_mask(mask, static=False)
