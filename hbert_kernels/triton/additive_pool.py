# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""Softmax pooling of packed sequences and its gradients in Triton.

Every form is one small matrix product on tensor cores: a scorer of a head's own slice is a row that is zero
elsewhere, and a head's own slice of the result is taken from the whole row when it is stored.

Sequences are cut into chunks of fixed size, counted from their own start: a sequence's result does not depend on
its neighbours. Most sequences fit one chunk and are finished by it; the parts of the others are added in order by
a last launch. The backward takes scores and their gradients first, whose mean over a sequence it needs then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import chunk_of_slot, group_of, launch, search_steps, slots_of

_SCORE_CHUNK = 64  # rows per program of the first pass of the backward
_GRADIENT_CHUNK = 256  # of the second one: a part of a scorer's gradient costs as much as some tens of rows
_PIECES, _SUM_COLS = 16, 512  # chunks whose sums are added at once
_HEADS = tl.constexpr(16)  # of a product: the least that a tensor core takes


@dataclass(frozen=True)
class Config:
    """How a pooling of rows of one width and dtype is cut into programs and tiles."""

    chunk: int  # rows per program of the forward
    rows: int  # of them at a time
    cols: int  # of a block of columns
    blocks: int  # of columns
    num_warps: int  # of the forward; half of them for the smaller tiles of the backward


def config(width: int, dtype: torch.dtype, full: bool) -> Config:
    """The configuration, a pure function of shape and dtype.

    A forward program keeps a block of rows and the scorers of 16 heads in shared memory, and their sums in
    registers. Where these are whole rows (``full``), a part costs as much as h rows, so that chunks are longer.
    The backward has the same blocks, so that it finds the same scores.
    """
    columns = max(16, min(64, triton.next_power_of_2(width)))
    rows = 32 if width <= 768 and dtype == torch.bfloat16 else 16
    warps = 4 if torch.version.hip else 8  # a wavefront of AMD has 64 lanes
    return Config(128 if full else 64, rows, columns, triton.cdiv(width, columns), warps)


@triton.jit
def _load_rows(x, rows, stop, columns, width):
    """[rows, columns] of x [T, width], as they are stored; zeros from row ``stop`` on."""
    mask = (rows < stop)[:, None] & (columns < width)[None, :]
    return tl.load(x + tl.cast(rows, tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(x, values, rows, stop, columns, width):
    """The inverse of _load_rows."""
    mask = (rows < stop)[:, None] & (columns < width)[None, :]
    places = x + tl.cast(rows, tl.int64)[:, None] * width + columns[None, :]
    tl.store(places, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_vectors(base, heads, columns, num_heads, width, head_dim, WHOLE: tl.constexpr):
    """[heads, columns] of one vector per head: of the whole width, or of the head's own slice, zero elsewhere."""
    if WHOLE:
        mask = (heads < num_heads)[:, None] & (columns < width)[None, :]
        return tl.load(base + heads[:, None] * width + columns[None, :], mask=mask, other=0.0)
    else:
        slices = tl.load(base + columns, mask=columns < width, other=0.0)
        return tl.where((columns // head_dim)[None, :] == heads[:, None], slices[None, :], 0.0)


@triton.jit
def _store_vectors(base, values, heads, columns, num_heads, width, head_dim, WHOLE: tl.constexpr):
    """The inverse of _load_vectors for the heads of a program, which follow each other."""
    if WHOLE:
        mask = (heads < num_heads)[:, None] & (columns < width)[None, :]
        tl.store(base + heads[:, None] * width + columns[None, :], values, mask=mask)
    else:
        owner = columns // head_dim
        own = owner[None, :] == heads[:, None]
        here = (owner >= tl.min(heads, 0)) & (owner <= tl.max(heads, 0)) & (columns < width)
        tl.store(base + columns, tl.sum(tl.where(own, values, 0.0), 0), mask=here)


# Products with the accuracy of float32.


@triton.jit
def _parts(a):
    """float32 as the sum of three bfloat16 values: exact, as far as the exponent reaches."""
    high = a.to(tl.bfloat16)
    rest = a - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b, total):
    """total + a b for a float32 a. Tensor cores multiply bfloat16 exactly: three products do for one."""
    if b.dtype == tl.bfloat16:
        high, middle, low = _parts(a)
        total = tl.dot(low, b, total)
        total = tl.dot(middle, b, total)
        return tl.dot(high, b, total)
    else:
        return tl.dot(a, b.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _rounded_product(a, b, total, dtype):
    """total + a b of float32, for a result that is rounded to ``dtype``: of each factor 16 bits do for 11 or 8."""
    if dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        a_high, a_low, _ = _parts(a)
        b_high, b_low, _ = _parts(b)
        total = tl.dot(a_low, b_high, total)
        total = tl.dot(a_high, b_low, total)
        return tl.dot(a_high, b_high, total)


# Forward.


@triton.jit
def _store_softmax(base, index, largest, total, heads, num_heads):
    base += tl.cast(index, tl.int64) * 2 * num_heads
    tl.store(base + heads, largest, mask=heads < num_heads)
    tl.store(base + num_heads + heads, total, mask=heads < num_heads)


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "steps"])
def pool_chunk(
    X, SCORER, CU, POOLED, SOFTMAX, PART_POOLED, PART_SOFTMAX,
    num_rows, num_seqs, steps, num_heads, width, head_dim, scorer_stride, pooled_stride, scale,
    DENSE: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One chunk under 16 heads. Its rows are read once and stay for both products."""
    slot = tl.program_id(0)
    seq, piece, begin, end = chunk_of_slot(CU, slot, num_rows, num_seqs, steps, CHUNK)
    if (seq == num_seqs) | (begin >= end):
        return
    heads = tl.program_id(1) * _HEADS + tl.arange(0, _HEADS)
    offsets = tl.arange(0, COLS)
    scorer = SCORER + tl.cast(seq, tl.int64) * scorer_stride
    vectors = ()
    sums = ()
    for block in tl.static_range(BLOCKS):
        columns = block * COLS + offsets
        vectors = vectors + (_load_vectors(scorer, heads, columns, num_heads, width, head_dim, DENSE),)
        sums = sums + (tl.zeros([_HEADS, COLS], tl.float32),)
    largest = tl.full([_HEADS], -float("inf"), tl.float32)
    total = tl.zeros([_HEADS], tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        scores = tl.zeros([_HEADS, ROWS], tl.float32)
        tiles = ()
        for block in tl.static_range(BLOCKS):
            tile = _load_rows(X, rows, end, block * COLS + offsets, width)
            scores = _product(vectors[block], tl.trans(tile), scores)
            tiles = tiles + (tile,)
        scores = tl.where((rows < end)[None, :], scores * scale, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        shrink = tl.exp(before - largest)
        weights = tl.exp(scores - largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        grown = ()
        for block in tl.static_range(BLOCKS):
            grown = grown + (_product(weights, tiles[block], sums[block] * shrink[:, None]),)
        sums = grown
    if tl.load(CU + seq + 1) - tl.load(CU + seq) <= CHUNK:
        _store_softmax(SOFTMAX, seq, largest, total, heads, num_heads)
        pooled = POOLED + tl.cast(seq, tl.int64) * pooled_stride
        for block in tl.static_range(BLOCKS):
            values = sums[block] / total[:, None]
            _store_vectors(pooled, values, heads, block * COLS + offsets, num_heads, width, head_dim, FULL)
    else:
        _store_softmax(PART_SOFTMAX, slot, largest, total, heads, num_heads)
        pooled = PART_POOLED + tl.cast(slot, tl.int64) * pooled_stride
        for block in tl.static_range(BLOCKS):
            _store_vectors(pooled, sums[block], heads, block * COLS + offsets, num_heads, width, head_dim, FULL)


@triton.jit
def merge_chunks(
    CU, POOLED, SOFTMAX, PART_POOLED, PART_SOFTMAX, num_heads, vector, CHUNK: tl.constexpr, COLS: tl.constexpr
):
    """One head of a sequence that has several chunks, merged in order, or none: zeros."""
    seq = tl.cast(tl.program_id(0) // num_heads, tl.int64)
    head = tl.program_id(0) % num_heads
    start = tl.load(CU + seq)
    length = tl.load(CU + seq + 1) - start
    if (length > 0) & (length <= CHUNK):
        return
    cols = tl.arange(0, COLS)
    slot = start // CHUNK + seq
    largest = -float("inf")
    total = 0.0
    sums = tl.zeros([COLS], tl.float32)
    for _ in range(0, length, CHUNK):
        theirs = tl.load(PART_SOFTMAX + slot * 2 * num_heads + head)
        before = largest
        largest = tl.maximum(before, theirs)
        shrink = tl.exp(before - largest)
        grow = tl.exp(theirs - largest)
        total = total * shrink + tl.load(PART_SOFTMAX + (slot * 2 + 1) * num_heads + head) * grow
        part = tl.load(PART_POOLED + (slot * num_heads + head) * vector + cols, mask=cols < vector, other=0.0)
        sums = sums * shrink + part * grow
        slot += 1
    empty = length == 0
    values = tl.where(empty, 0.0, sums / tl.where(empty, 1.0, total))
    tl.store(POOLED + (seq * num_heads + head) * vector + cols, values, mask=cols < vector)
    tl.store(SOFTMAX + seq * 2 * num_heads + head, tl.where(empty, 0.0, largest))
    tl.store(SOFTMAX + (seq * 2 + 1) * num_heads + head, total)


# Backward: with dalpha_j = x dpooled_j, dscore_j = alpha_j (dalpha_j - sum_t alpha_j dalpha_j) scale.


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "steps"])
def score_chunk(
    X, SCORER, CU, SOFTMAX, DPOOLED, WEIGHTS, PART_MEAN,
    num_rows, num_seqs, steps, num_heads, width, head_dim, scorer_stride, pooled_stride, scale,
    DENSE: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """WEIGHTS [2, h, T]: alpha and dalpha of a chunk's rows; PART_MEAN [slots, h]: the sums of their products.

    The mean comes from the same dalpha: where one row has all the weight, the two cancel exactly.
    """
    slot = tl.program_id(0)
    seq, piece, begin, end = chunk_of_slot(CU, slot, num_rows, num_seqs, steps, CHUNK)
    if (seq == num_seqs) | (begin >= end):
        return
    heads = tl.program_id(1) * _HEADS + tl.arange(0, _HEADS)
    present = heads < num_heads
    scorer = SCORER + tl.cast(seq, tl.int64) * scorer_stride
    dpooled = DPOOLED + tl.cast(seq, tl.int64) * pooled_stride
    softmax = SOFTMAX + tl.cast(seq, tl.int64) * 2 * num_heads
    largest = tl.load(softmax + heads, mask=present, other=0.0)
    total = tl.load(softmax + num_heads + heads, mask=present, other=1.0)
    mean = tl.zeros([_HEADS], tl.float32)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        scores = tl.zeros([_HEADS, ROWS], tl.float32)
        dalpha = tl.zeros([_HEADS, ROWS], tl.float32)
        for first in range(0, width, COLS):
            columns = first + tl.arange(0, COLS)
            tile = tl.trans(_load_rows(X, rows, end, columns, width))
            vectors = _load_vectors(scorer, heads, columns, num_heads, width, head_dim, DENSE)
            scores = _product(vectors, tile, scores)
            vectors = _load_vectors(dpooled, heads, columns, num_heads, width, head_dim, FULL)
            dalpha = _product(vectors, tile, dalpha)
        mask = present[:, None] & (rows < end)[None, :]
        # Chosen as in pool_chunk, so that the product is rounded as it is there and not fused with the difference.
        scores = tl.where((rows < end)[None, :], scores * scale, -float("inf"))
        alpha = tl.exp(scores - largest[:, None]) / total[:, None]
        mean += tl.sum(alpha * dalpha, 1)
        places = WEIGHTS + tl.cast(heads, tl.int64)[:, None] * num_rows + rows[None, :]
        tl.store(places, alpha, mask=mask)
        tl.store(places + tl.cast(num_heads, tl.int64) * num_rows, dalpha, mask=mask)
    tl.store(PART_MEAN + tl.cast(slot, tl.int64) * num_heads + heads, mean, mask=present)


@triton.jit
def _mean_of_sequence(PART_MEAN, CU, seq, heads, num_heads, CHUNK: tl.constexpr, PIECES: tl.constexpr):
    """The sum of the parts of one sequence, always in the same order."""
    start = tl.load(CU + seq)
    count = tl.cdiv(tl.load(CU + seq + 1) - start, CHUNK)
    part = PART_MEAN + tl.cast(start // CHUNK + seq, tl.int64) * num_heads + heads[:, None]
    mean = tl.zeros(heads.shape, tl.float32)
    for first in range(0, count, PIECES):
        pieces = first + tl.arange(0, PIECES)
        mask = (heads < num_heads)[:, None] & (pieces < count)[None, :]
        mean += tl.sum(tl.load(part + pieces[None, :] * num_heads, mask=mask, other=0.0), 1)
    return mean


@triton.jit
def _store_groups(base, values, columns, num_heads, width, head_dim, WHOLE: tl.constexpr, GROUPS: tl.constexpr):
    for group in tl.static_range(GROUPS):
        heads = group * _HEADS + tl.arange(0, _HEADS)
        _store_vectors(base, values[group], heads, columns, num_heads, width, head_dim, WHOLE)


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "steps", "slots"])
def gradient_chunk(
    X, SCORER, CU, DPOOLED, WEIGHTS, PART_MEAN, DX, DSCORER, PARTS,
    num_rows, num_seqs, steps, num_heads, width, head_dim, scorer_stride, pooled_stride, scale, slots, table,
    SHARED: tl.constexpr, DENSE: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr, MEAN_CHUNK: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Some columns of dx of a chunk, or of ``slots`` of them that share a scorer, and of the scorer's gradient."""
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first_slot = tl.program_id(0) * slots
    dscorers = ()
    for _ in tl.static_range(GROUPS):
        dscorers = dscorers + (tl.zeros([_HEADS, COLS], tl.float32),)
    for slot in range(first_slot, first_slot + slots):
        seq, piece, begin, end = chunk_of_slot(CU, slot, num_rows, num_seqs, steps, CHUNK)
        if seq == num_seqs:
            for start in range(begin, end, ROWS):
                rows = start + tl.arange(0, ROWS)
                _store_rows(DX, tl.zeros([ROWS, COLS], tl.float32), rows, end, columns, width)
        elif begin < end:
            scorer = SCORER + tl.cast(seq, tl.int64) * scorer_stride
            dpooled = DPOOLED + tl.cast(seq, tl.int64) * pooled_stride
            means = ()
            vectors = ()
            dvectors = ()
            for group in tl.static_range(GROUPS):
                heads = group * _HEADS + tl.arange(0, _HEADS)
                means = means + (_mean_of_sequence(PART_MEAN, CU, seq, heads, num_heads, MEAN_CHUNK, PIECES),)
                vectors = vectors + (_load_vectors(scorer, heads, columns, num_heads, width, head_dim, DENSE),)
                dvectors = dvectors + (_load_vectors(dpooled, heads, columns, num_heads, width, head_dim, FULL),)
            for start in range(begin, end, ROWS):
                rows = start + tl.arange(0, ROWS)
                tile = _load_rows(X, rows, end, columns, width)
                dx = tl.zeros([ROWS, COLS], tl.float32)
                grown = ()
                for group in tl.static_range(GROUPS):
                    heads = group * _HEADS + tl.arange(0, _HEADS)
                    mask = (heads < num_heads)[:, None] & (rows < end)[None, :]
                    places = WEIGHTS + tl.cast(heads, tl.int64)[:, None] * num_rows + rows[None, :]
                    alpha = tl.load(places, mask=mask, other=0.0)
                    dalpha = tl.load(places + tl.cast(num_heads, tl.int64) * num_rows, mask=mask, other=0.0)
                    dscores = alpha * (dalpha - means[group][:, None]) * scale
                    grown = grown + (_product(dscores, tile, dscorers[group]),)
                    dx = _rounded_product(tl.trans(dscores), vectors[group], dx, DX.dtype.element_ty)
                    dx = _rounded_product(tl.trans(alpha), dvectors[group], dx, DX.dtype.element_ty)
                dscorers = grown
                _store_rows(DX, dx, rows, end, columns, width)
    if SHARED:
        part = PARTS + tl.cast(tl.program_id(0), tl.int64) * table
        _store_groups(part, dscorers, columns, num_heads, width, head_dim, DENSE, GROUPS)
    else:
        seq, piece, begin, end = chunk_of_slot(CU, first_slot, num_rows, num_seqs, steps, CHUNK)
        if (seq < num_seqs) & (begin < end):
            if tl.load(CU + seq + 1) - tl.load(CU + seq) <= CHUNK:
                whole = DSCORER + tl.cast(seq, tl.int64) * table
                _store_groups(whole, dscorers, columns, num_heads, width, head_dim, DENSE, GROUPS)
            else:
                part = PARTS + tl.cast(first_slot, tl.int64) * table
                _store_groups(part, dscorers, columns, num_heads, width, head_dim, DENSE, GROUPS)


@triton.jit(do_not_specialize=["num_parts"])
def sum_chunks(
    CU, DSCORER, PARTS, num_parts, table,
    SHARED: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The parts of a scorer's gradient in order: of a shared one, or of a sequence of several chunks or none."""
    seq = tl.cast(tl.program_id(0), tl.int64)
    first = seq
    count = num_parts
    if not SHARED:
        start = tl.load(CU + seq)
        length = tl.load(CU + seq + 1) - start
        if (length > 0) & (length <= CHUNK):
            return
        first = start // CHUNK + seq
        count = tl.cdiv(length, CHUNK)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for begin in range(0, count, PIECES):
        pieces = begin + tl.arange(0, PIECES)
        mask = (pieces < count)[:, None] & (cols < table)[None, :]
        part = tl.load(PARTS + (first + pieces)[:, None] * table + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(part, 0)
    tl.store(DSCORER + seq * table + cols, total, mask=cols < table)


# Launches.


@dataclass(frozen=True)
class _Problem:
    """What the launches of a pooling have in common."""

    x: Tensor
    scorer: Tensor
    cu_seqlens: Tensor
    num_heads: int
    full: bool
    config: Config

    @property
    def num_seqs(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def vector(self) -> int:
        """Values that a head pools."""
        return self.x.shape[1] if self.full else self.x.shape[1] // self.num_heads

    @property
    def scorer_stride(self) -> int:
        """Values between the scorers of two sequences; 0 where all share one."""
        return self.scorer.shape[1] * self.scorer.shape[2] if self.scorer.dim() == 3 else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """num_rows, num_seqs, steps, num_heads, width, head_dim, scorer_stride, pooled_stride of a kernel."""
        (rows, width), seqs = self.x.shape, self.num_seqs
        heads = self.num_heads
        strides = self.scorer_stride, heads * self.vector
        return rows, seqs, search_steps(seqs), heads, width, width // heads, *strides

    def slots(self, chunk: int) -> int:
        return slots_of(self.x.shape[0], self.num_seqs, chunk)

    @property
    def groups(self) -> int:
        """Of heads."""
        return triton.cdiv(self.num_heads, _HEADS.value)

    @property
    def options(self) -> dict[str, int]:
        dense = self.scorer.shape[-1] == self.x.shape[1]
        return {"DENSE": dense, "FULL": self.full, "ROWS": self.config.rows, "COLS": self.config.cols}


def _problem(x: Tensor, scorer: Tensor, cu_seqlens: Tensor, num_heads: int, full: bool) -> _Problem:
    c = config(x.shape[1], x.dtype, full)
    return _Problem(x.contiguous(), scorer.contiguous(), cu_seqlens.contiguous(), num_heads, full, c)


def additive_pool(
    x: Tensor, scorer: Tensor, cu_seqlens: Tensor, num_heads: int, full: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The op of the same name: (pooled [B, H] or [B, h, H], softmax [B, 2, h]), two launches.

    ``softmax`` holds the largest score of each head and the sum of exp(score - largest).
    """
    p = _problem(x, scorer, cu_seqlens, num_heads, full)
    slots = p.slots(p.config.chunk)
    pooled = p.scorer.new_empty((p.num_seqs, num_heads, p.vector) if full else (p.num_seqs, x.shape[1]))
    softmax = p.scorer.new_empty(p.num_seqs, 2, num_heads)
    part_pooled = p.scorer.new_empty(slots, num_heads, p.vector)
    part_softmax = p.scorer.new_empty(slots, 2, num_heads)
    outputs = pooled, softmax, part_pooled, part_softmax
    chunked = {"CHUNK": p.config.chunk}
    launch(
        pool_chunk, (slots, p.groups), p.x, p.scorer, p.cu_seqlens, *outputs, *p.sizes, scale,
        BLOCKS=p.config.blocks, num_warps=p.config.num_warps, num_stages=1, **chunked, **p.options,
    )  # fmt: skip
    columns = triton.next_power_of_2(p.vector)
    grid = (p.num_seqs * num_heads,)
    launch(merge_chunks, grid, p.cu_seqlens, *outputs, num_heads, p.vector, COLS=columns, num_warps=4, **chunked)
    return pooled, softmax


def additive_pool_backward(
    dpooled: Tensor,
    x: Tensor,
    scorer: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    softmax: Tensor,
    num_heads: int,
    full: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The op of the same name: the gradients of x and the scorer, three launches."""
    p = _problem(x, scorer, cu_seqlens, num_heads, full)
    dpooled = dpooled.contiguous()
    tiling = p.options | {"num_warps": p.config.num_warps // 2, "num_stages": 2}
    weights = p.scorer.new_empty(2, num_heads, x.shape[0])
    slots = p.slots(_SCORE_CHUNK)
    part_mean = p.scorer.new_empty(slots, num_heads)
    launch(
        score_chunk, (slots, p.groups), p.x, p.scorer, p.cu_seqlens, softmax.contiguous(), dpooled, weights,
        part_mean, *p.sizes, scale, CHUNK=_SCORE_CHUNK, **tiling,
    )  # fmt: skip
    dx, dscorer = torch.empty_like(p.x), torch.empty_like(p.scorer)
    slots, shared = p.slots(_GRADIENT_CHUNK), p.scorer.dim() == 2
    own_slots = group_of(x.shape[0], slots, _GRADIENT_CHUNK) if shared else 1
    programs = triton.cdiv(slots, own_slots)
    table = p.scorer.shape[-2] * p.scorer.shape[-1]
    parts = p.scorer.new_empty(programs, table)
    launch(
        gradient_chunk, (programs, p.config.blocks), p.x, p.scorer, p.cu_seqlens, dpooled, weights, part_mean,
        dx, dscorer, parts, *p.sizes, scale, own_slots, table, SHARED=shared, CHUNK=_GRADIENT_CHUNK,
        MEAN_CHUNK=_SCORE_CHUNK, PIECES=_PIECES, GROUPS=p.groups, **tiling,
    )  # fmt: skip
    grid = 1 if shared else p.num_seqs, triton.cdiv(table, _SUM_COLS)
    launch(
        sum_chunks, grid, p.cu_seqlens, dscorer, parts, programs, table,
        SHARED=shared, CHUNK=_GRADIENT_CHUNK, PIECES=_PIECES, COLS=_SUM_COLS, num_warps=4,
    )  # fmt: skip
    return dx, dscorer
