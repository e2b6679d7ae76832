# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""Layer norm followed by a short depthwise convolution inside each sequence: a ring of k rows stays in registers.

A program has several lanes, the rows of its tile. Each lane walks down a chunk of one sequence, a row per step,
and reads k - 1 more rows than it writes, k // 2 before its chunk and as many behind.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MAX_PARTS,
    Plan,
    chunk_of_slot,
    dense,
    group_of,
    launch,
    load_parameter,
    new_parts,
    new_statistics,
    parameter_gradients,
    search_steps,
    slots_of,
    store_part,
    tile_of,
)

_MIN_PROGRAMS = 512
_MAX_CHUNK = 128


@triton.jit
def _taps(CONV, cols, inside, width, TAPS: tl.constexpr):
    """The taps in float32, with the residual as one more unit in the middle one."""
    taps = ()
    for tap in tl.static_range(TAPS):
        row = tl.load(CONV + tap * width + cols, mask=inside, other=0.0).to(tl.float32)
        if tap == TAPS // 2:
            row += 1.0
        taps = taps + (row,)  # type: ignore[assignment]
    return taps


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COUNT tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([ROWS, COLS], tl.float32),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _lanes(CU, slots, num_rows, num_seqs, search_steps, chunk):
    """Of each lane: ``(alive, first row, end)`` of its chunk, ``(start, end)`` of its sequence, empty if dead."""
    seq, _, first, end = chunk_of_slot(CU, slots, num_rows, num_seqs, search_steps, chunk)
    alive = seq < num_seqs
    start = tl.load(CU + seq, mask=alive, other=0)
    stop = tl.load(CU + seq + 1, mask=alive, other=0)
    return alive, first, end, start, stop


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "search_steps", "chunk", "group"])
def conv_norm_forward(
    X,
    WEIGHT,
    BIAS,
    CONV,
    CU,
    Y,
    MEAN,
    RSTD,
    num_rows,
    num_seqs,
    search_steps,
    chunk,
    group,
    width,
    eps,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``Y_t = N_t + sum_j w_j o N_{t+j}`` of the normalized rows N of a sequence."""
    REACH: tl.constexpr = TAPS // 2
    cols = tl.arange(0, COLS)
    inside = cols < width
    weight = load_parameter(WEIGHT, cols, inside, 1.0)
    bias = load_parameter(BIAS, cols, inside, 0.0)
    taps = _taps(CONV, cols, inside, width, TAPS)
    first_slot = tl.program_id(0) * group * ROWS
    for place in range(group):
        slots = first_slot + place * ROWS + tl.arange(0, ROWS)
        alive, first, end, start, stop = _lanes(CU, slots, num_rows, num_seqs, search_steps, chunk)
        ring = _zeros(TAPS, ROWS, COLS)
        steps = tl.max(end - first, 0)
        for step in range(-REACH, tl.where(steps > 0, steps + REACH, -REACH)):
            rows = first + step
            read = (rows >= start) & (rows < stop) & (rows < end + REACH) & (first < end)
            mask = read[:, None] & inside[None, :]
            x = tl.load(X + tl.cast(rows, tl.int64)[:, None] * width + cols[None, :], mask=mask, other=0.0)
            x = x.to(tl.float32)
            mean = tl.sum(x, 1) / width
            centred = tl.where(mask, x - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
            normed = tl.where(mask, centred * rstd[:, None] * weight[None, :] + bias[None, :], 0.0)
            ring = ring[1:] + (normed,)
            own = (rows >= first) & (rows < end)
            tl.store(MEAN + rows, tl.where(alive, mean, 0.0), mask=own)
            tl.store(RSTD + rows, tl.where(alive, rstd, 0.0), mask=own)
            y = ring[0] * taps[0][None, :]
            for tap in tl.static_range(1, TAPS):
                y += ring[tap] * taps[tap][None, :]
            target = rows - REACH
            mask = ((target >= first) & (target < end))[:, None] & inside[None, :]
            offsets = tl.cast(target, tl.int64)[:, None] * width + cols[None, :]
            tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "search_steps", "chunk", "group", "num_parts"])
def conv_norm_backward(
    DY,
    X,
    WEIGHT,
    BIAS,
    CONV,
    CU,
    MEAN,
    RSTD,
    DX,
    PARTS,
    num_rows,
    num_seqs,
    search_steps,
    chunk,
    group,
    num_parts,
    width,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of :func:`conv_norm_forward`; those of parameters in one part per program.

    N_t reached the output of row t - j through tap j: only gradients of other rows are read, never their x.
    """
    REACH: tl.constexpr = TAPS // 2
    cols = tl.arange(0, COLS)
    inside = cols < width
    weight = load_parameter(WEIGHT, cols, inside, 1.0)
    bias = load_parameter(BIAS, cols, inside, 0.0)
    taps = _taps(CONV, cols, inside, width, TAPS)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    dtaps = _zeros(TAPS, ROWS, COLS)
    first_slot = tl.program_id(0) * group * ROWS
    for place in range(group):
        slots = first_slot + place * ROWS + tl.arange(0, ROWS)
        alive, first, end, start, stop = _lanes(CU, slots, num_rows, num_seqs, search_steps, chunk)
        ring = _zeros(TAPS, ROWS, COLS)
        steps = tl.max(end - first, 0)
        for step in range(-REACH, tl.where(steps > 0, steps + REACH, -REACH)):
            rows = first + step
            read = (rows >= start) & (rows < stop) & (rows < end + REACH) & (first < end)
            mask = read[:, None] & inside[None, :]
            dy = tl.load(DY + tl.cast(rows, tl.int64)[:, None] * width + cols[None, :], mask=mask, other=0.0)
            ring = ring[1:] + (dy.to(tl.float32),)
            target = rows - REACH
            own = (target >= first) & (target < end)
            mask = own[:, None] & inside[None, :]
            offsets = tl.cast(target, tl.int64)[:, None] * width + cols[None, :]
            x = tl.load(X + offsets, mask=mask & alive[:, None], other=0.0).to(tl.float32)
            mean = tl.load(MEAN + target, mask=own, other=0.0)
            rstd = tl.load(RSTD + target, mask=own, other=0.0)
            xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            normed = tl.where(mask, xhat * weight[None, :] + bias[None, :], 0.0)
            dnormed = tl.zeros([ROWS, COLS], tl.float32)
            sums = ()
            for tap in tl.static_range(TAPS):
                # ring[i] is the gradient of row target + i - REACH, which saw the target through tap TAPS - 1 - i.
                dnormed += ring[TAPS - 1 - tap] * taps[tap][None, :]
                dtap = dtaps[tap] + ring[TAPS - 1 - tap] * normed
                sums = sums + (dtap,)  # type: ignore[assignment]
            dtaps = sums
            dnormed = tl.where(mask, dnormed, 0.0)
            g = dnormed * weight[None, :]
            along = tl.sum(g * xhat, 1) / width
            shift = tl.sum(g, 1) / width
            dx = (g - shift[:, None] - xhat * along[:, None]) * rstd[:, None]
            dweight += dnormed * xhat
            dbias += dnormed
            tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
    if WEIGHT is not None:
        store_part(PARTS, dweight, cols, inside, width, num_parts, 0)
    if BIAS is not None:
        store_part(PARTS, dbias, cols, inside, width, num_parts, 1)
    for tap in tl.static_range(TAPS):
        store_part(PARTS, dtaps[tap], cols, inside, width, num_parts, 2 + tap)


def _chunk_of(num_rows: int, lanes: int, least: int) -> int:
    """Rows of a lane: long ones read few rows twice, short ones make programs enough to fill a GPU."""
    chunk = least
    while chunk < _MAX_CHUNK and num_rows >= 2 * chunk * lanes * _MIN_PROGRAMS:
        chunk *= 2
    return chunk


def _per_thread(taps: int) -> int:
    return 8 if taps <= 5 else 4


def forward_plan(num_rows: int, num_seqs: int, width: int, taps: int) -> Plan:
    """Plan of :func:`conv_norm_forward`."""
    tile = tile_of(width, 2048, _per_thread(taps), max_rows=64)
    chunk = _chunk_of(num_rows, tile.rows, least=8)
    slots = slots_of(num_rows, num_seqs, chunk)
    group = group_of(num_rows, slots, chunk)
    return Plan(tile, chunk, group, triton.cdiv(slots, group * tile.rows))


def backward_plan(num_rows: int, num_seqs: int, width: int, taps: int) -> Plan:
    """Plan of :func:`conv_norm_backward`: at most MAX_PARTS programs."""
    tile = tile_of(width, 1024, _per_thread(taps), max_rows=64)
    chunk = _chunk_of(num_rows, tile.rows, least=16)  # of a shorter one, the parts would outweigh the rows
    slots = slots_of(num_rows, num_seqs, chunk)
    group = max(group_of(num_rows, slots, chunk), triton.cdiv(slots, MAX_PARTS * tile.rows))
    return Plan(tile, chunk, group, triton.cdiv(slots, group * tile.rows))


def conv_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, conv_weight: Tensor, cu_seqlens: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``hbert_kernels::conv_layer_norm``: ``(y, mean, rstd)``, zero in dead rows."""
    x = x.contiguous()
    (num_rows, width), num_seqs = x.shape, cu_seqlens.shape[0] - 1
    taps = conv_weight.shape[0]
    plan = forward_plan(num_rows, num_seqs, width, taps)
    results = torch.empty_like(x), *new_statistics(x)
    parameters = [dense(t) for t in (weight, bias, conv_weight, cu_seqlens)]
    sizes = num_rows, num_seqs, search_steps(num_seqs), plan.chunk, plan.group, width, eps
    options = plan.tile.options | {"TAPS": taps}
    launch(conv_norm_forward, (plan.programs,), x, *parameters, *results, *sizes, **options)
    return results


def conv_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hbert_kernels::conv_layer_norm_backward``: ``(dx, dweight, dbias, dconv_weight)``."""
    x = x.contiguous()
    (num_rows, width), num_seqs, taps = x.shape, cu_seqlens.shape[0] - 1, conv_weight.shape[0]
    plan = backward_plan(num_rows, num_seqs, width, taps)
    dx, parts = torch.empty_like(x), new_parts(x, 2 + taps, plan.programs)
    inputs = dense(dy), x, *[dense(t) for t in (weight, bias, conv_weight, cu_seqlens)], mean, rstd
    sizes = num_rows, num_seqs, search_steps(num_seqs), plan.chunk, plan.group, plan.programs, width
    options = plan.tile.options | {"TAPS": taps}
    launch(conv_norm_backward, (plan.programs,), *inputs, dx, parts, *sizes, **options)
    dweight, dbias, dconv_weight = parameter_gradients(parts, weight, bias, conv_weight)
    return dx, dweight, dbias, dconv_weight
