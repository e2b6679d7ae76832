# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""Layer norms of rows from several sources: plain, residual sum, activation, gate of the row's sequence.

One kernel forward and one backward; which pointers are None decides at compile time what a row is. A backward call
sums the gradients of parameters per program, and a second kernel adds these in order. The gate's gradient is
added up from chunks of a sequence, counted from its own start: its bits do not depend on the neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MAX_PARTS,
    MIN_ROWS,
    Plan,
    chunk_of_slot,
    dense,
    group_of,
    launch,
    load_parameter,
    new_parts,
    new_statistics,
    parameter_gradients,
    round_up,
    rows_of_program,
    search_steps,
    slots_of,
    store_part,
    tile_of,
)

_TILE = 1024  # values of a tile: larger ones take the registers of a second program
_GATE_CHUNK = 16  # rows that are summed in one piece of a gate's gradient; the results depend on it
_GATE_SUM = {"PIECES": 32, "COLS": 64, "num_warps": 4}
_GATE_SUM_PROGRAMS = 256
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)  # of the normal distribution: 1 / sqrt(2 pi)
# gelu_tanh: 1/2 (1 + tanh(u)) is the sigmoid of 2u, 2u = a (x + c x^3) with a = 2 sqrt(2 / pi)
_A: tl.constexpr = tl.constexpr(1.5957691216057308)
_C: tl.constexpr = tl.constexpr(0.044715)
_3C: tl.constexpr = tl.constexpr(0.134145)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """gelu, gelu_tanh or relu by the op's code. NaN stays NaN."""
    if ACTIVATION == 0:
        return 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))
    elif ACTIVATION == 1:
        return x / (1.0 + tl.exp(-(x + x * x * x * _C) * _A))
    else:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of :func:`_activate`."""
    if ACTIVATION == 0:
        return 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * _DENSITY_AT_0
    elif ACTIVATION == 1:
        gate = 1.0 / (1.0 + tl.exp(-(x + x * x * x * _C) * _A))
        return gate + x * gate * (1.0 - gate) * (1.0 + x * x * _3C) * _A
    else:
        return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def _chunk(CU, slot, num_rows, num_seqs, search_steps, chunk):
    """:func:`chunk_of_slot`; without sequences, chunks of all rows."""
    if CU is None:
        first = tl.cast(slot, tl.int32) * chunk
        return 0, 0, first, tl.minimum(first + chunk, num_rows)
    else:
        return chunk_of_slot(CU, slot, num_rows, num_seqs, search_steps, chunk)


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "search_steps", "chunk", "group"])
def row_norm_forward(
    X,
    RESIDUAL,
    GATE,
    INPUT_BIAS,
    WEIGHT,
    BIAS,
    CU,
    Y,
    TOTAL,
    MEAN,
    RSTD,
    num_rows,
    num_seqs,
    search_steps,
    chunk,
    group,
    width,
    eps,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """LN of x, of x + residual, of act(x + input_bias), or of x times the gate of the row's sequence."""
    cols = tl.arange(0, COLS)
    inside = cols < width
    weight = load_parameter(WEIGHT, cols, inside, 1.0)
    bias = load_parameter(BIAS, cols, inside, 0.0)
    input_bias = load_parameter(INPUT_BIAS, cols, inside, 0.0)
    first_slot = tl.program_id(0) * group
    for slot in range(first_slot, first_slot + group):
        seq, piece, first, end = _chunk(CU, slot, num_rows, num_seqs, search_steps, chunk)
        if GATE is not None:
            alive = seq < num_seqs
            gate_row = GATE + tl.cast(seq, tl.int64) * width
            gate = tl.load(gate_row + cols, mask=inside & alive & (first < end), other=0.0)
        for start in range(first, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            mask = (rows < end)[:, None] & inside[None, :]
            offsets = tl.cast(rows, tl.int64)[:, None] * width + cols[None, :]
            if GATE is None:
                v = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
            else:
                v = tl.load(X + offsets, mask=mask & alive, other=0.0).to(tl.float32) * gate[None, :]
            if RESIDUAL is not None:
                total = v + tl.load(RESIDUAL + offsets, mask=mask, other=0.0).to(tl.float32)
                rounded = total.to(TOTAL.dtype.element_ty)
                tl.store(TOTAL + offsets, rounded, mask=mask)
                v = rounded.to(tl.float32)
            if ACTIVATION is not None:
                v = tl.where(mask, _activate(v + input_bias[None, :], ACTIVATION), 0.0)
            mean = tl.sum(v, 1) / width
            centred = tl.where(mask, v - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
            y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
            if GATE is not None:
                y = tl.where(alive, y, 0.0)
                rstd = tl.where(alive, rstd, 0.0)
            tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=mask)
            tl.store(MEAN + rows, mean, mask=rows < end)
            tl.store(RSTD + rows, rstd, mask=rows < end)


@triton.jit
def _gate_part(first, piece, chunk):
    """Where the sum of a chunk is kept: no two chunks of sequences longer than ``chunk`` have the same place.

    Chunks of one sequence start ``chunk`` rows apart. The first one of such a sequence is full, so that only it
    can start in the same ``chunk`` rows as another one, the last of the sequence before.
    """
    return tl.cast(2 * (first // chunk) + tl.where(piece == 0, 1, 0), tl.int64)


@triton.jit
def _store_gate_gradient(DGATE, GATE_PARTS, CU, seq, piece, first, end, num_seqs, values, cols, inside, width, chunk):
    """The gradient itself for a sequence of one chunk (or none: zeros), otherwise a part of it."""
    alive = seq < num_seqs
    length = tl.load(CU + seq + 1, mask=alive, other=0) - tl.load(CU + seq)
    total = tl.sum(values, 0)
    whole = inside & alive & (length <= chunk) & (piece == 0)
    tl.store(DGATE + tl.cast(seq, tl.int64) * width + cols, total, mask=whole)
    part = inside & alive & (length > chunk) & (first < end)
    tl.store(GATE_PARTS + _gate_part(first, piece, chunk) * width + cols, total, mask=part)


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "search_steps", "chunk", "group", "num_parts"])
def row_norm_backward(
    DY,
    DTOTAL,
    X,
    GATE,
    INPUT_BIAS,
    WEIGHT,
    BIAS,
    CU,
    MEAN,
    RSTD,
    DX,
    DGATE,
    GATE_PARTS,
    PARTS,
    num_rows,
    num_seqs,
    search_steps,
    chunk,
    group,
    num_parts,
    width,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of :func:`row_norm_forward`; those of parameters in one part per program."""
    cols = tl.arange(0, COLS)
    inside = cols < width
    weight = load_parameter(WEIGHT, cols, inside, 1.0)
    input_bias = load_parameter(INPUT_BIAS, cols, inside, 0.0)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    dinput_bias = tl.zeros([ROWS, COLS], tl.float32)
    first_slot = tl.program_id(0) * group
    for slot in range(first_slot, first_slot + group):
        seq, piece, first, end = _chunk(CU, slot, num_rows, num_seqs, search_steps, chunk)
        if GATE is not None:
            alive = seq < num_seqs
            gate_row = GATE + tl.cast(seq, tl.int64) * width
            gate = tl.load(gate_row + cols, mask=inside & alive & (first < end), other=0.0)
            dgate = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(first, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            mask = (rows < end)[:, None] & inside[None, :]
            offsets = tl.cast(rows, tl.int64)[:, None] * width + cols[None, :]
            read = mask
            if GATE is not None:
                read = mask & alive
            x = tl.load(X + offsets, mask=read, other=0.0).to(tl.float32)
            dy = tl.load(DY + offsets, mask=read, other=0.0).to(tl.float32)
            mean = tl.load(MEAN + rows, mask=rows < end, other=0.0)
            rstd = tl.load(RSTD + rows, mask=rows < end, other=0.0)
            v = x
            if GATE is not None:
                v = x * gate[None, :]
            if ACTIVATION is not None:
                v = _activate(x + input_bias[None, :], ACTIVATION)
            xhat = tl.where(mask, (v - mean[:, None]) * rstd[:, None], 0.0)
            g = dy * weight[None, :]
            along = tl.sum(g * xhat, 1) / width
            shift = tl.sum(g, 1) / width
            dx = (g - shift[:, None] - xhat * along[:, None]) * rstd[:, None]
            dweight += dy * xhat
            dbias += dy
            if GATE is not None:
                dgate += dx * x
                dx = dx * gate[None, :]
            if ACTIVATION is not None:
                dx = tl.where(mask, dx * _slope(x + input_bias[None, :], ACTIVATION), 0.0)
                dinput_bias += dx
            if DTOTAL is not None:
                dx += tl.load(DTOTAL + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
        if GATE is not None:
            _store_gate_gradient(
                DGATE, GATE_PARTS, CU, seq, piece, first, end, num_seqs, dgate, cols, inside, width, chunk
            )
    if WEIGHT is not None:
        store_part(PARTS, dweight, cols, inside, width, num_parts, 0)
    if BIAS is not None:
        store_part(PARTS, dbias, cols, inside, width, num_parts, 1)
    if INPUT_BIAS is not None:
        store_part(PARTS, dinput_bias, cols, inside, width, num_parts, 2)


@triton.jit(do_not_specialize=["num_seqs", "chunk"])
def sum_gate_parts(GATE_PARTS, DGATE, CU, num_seqs, chunk, width, PIECES: tl.constexpr, COLS: tl.constexpr):
    """Gradient of the gate of every sequence of several chunks: its parts, added in order."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    for seq in range(tl.program_id(0), num_seqs, tl.num_programs(0)):
        start = tl.load(CU + seq)
        length = tl.load(CU + seq + 1) - start
        if length > chunk:
            pieces = tl.cdiv(length, chunk)
            total = tl.zeros([PIECES, COLS], tl.float32)
            for base in range(0, pieces, PIECES):
                piece = base + tl.arange(0, PIECES)
                part = _gate_part(start + piece * chunk, piece, chunk)
                mask = (piece < pieces)[:, None] & (cols < width)[None, :]
                total += tl.load(GATE_PARTS + part[:, None] * width + cols[None, :], mask=mask, other=0.0)
            tl.store(DGATE + tl.cast(seq, tl.int64) * width + cols, tl.sum(total, 0), mask=cols < width)


def forward_plan(num_rows: int, num_seqs: int | None, width: int) -> Plan:
    """Plan of :func:`row_norm_forward`; ``num_seqs`` is None where rows have no sequence."""
    tile = tile_of(width, _TILE, per_thread=8, max_rows=64)
    chunk = rows_of_program(num_rows, tile.rows)
    if num_seqs is None:
        return Plan(tile, chunk, 1, triton.cdiv(num_rows, chunk))
    slots = slots_of(num_rows, num_seqs, chunk)
    group = group_of(num_rows, slots, chunk)
    return Plan(tile, chunk, group, triton.cdiv(slots, group))


def backward_plan(num_rows: int, num_seqs: int | None, width: int) -> Plan:
    """Plan of :func:`row_norm_backward`: at most MAX_PARTS programs, each of MIN_ROWS rows or more."""
    if num_seqs is None:
        tile = tile_of(width, _TILE, per_thread=8, max_rows=64)
        chunk = round_up(max(MIN_ROWS, triton.cdiv(num_rows, MAX_PARTS)), tile.rows)
        return Plan(tile, chunk, 1, triton.cdiv(num_rows, chunk))
    tile = tile_of(width, _TILE, per_thread=8, max_rows=_GATE_CHUNK)
    slots = slots_of(num_rows, num_seqs, _GATE_CHUNK)
    group = max(group_of(num_rows, slots, MIN_ROWS), triton.cdiv(slots, MAX_PARTS))
    return Plan(tile, _GATE_CHUNK, group, triton.cdiv(slots, group))


def _sequences(cu_seqlens: Tensor | None) -> int | None:
    return None if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: int | None = None,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """``(y, total or None, mean, rstd)``."""
    x = x.contiguous()
    num_rows, width = x.shape
    num_seqs = _sequences(cu_seqlens)
    plan = forward_plan(num_rows, num_seqs, width)
    y = torch.empty_like(x)
    total = None
    if residual is not None:
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean, rstd = new_statistics(x)
    inputs = [dense(t) for t in (residual, gate, input_bias, weight, bias, cu_seqlens)]
    sizes = num_rows, num_seqs or 0, search_steps(num_seqs or 0), plan.chunk, plan.group, width
    results = y, total, mean, rstd
    arguments = x, *inputs, *results, *sizes, eps
    launch(row_norm_forward, (plan.programs,), *arguments, ACTIVATION=activation, **plan.tile.options)
    return results


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    dtotal: Tensor | None = None,
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: int | None = None,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """``(dx, dgate or None, gradients of weight, bias and input_bias)``."""
    x = x.contiguous()
    num_rows, width = x.shape
    num_seqs = _sequences(cu_seqlens)
    plan = backward_plan(num_rows, num_seqs, width)
    dx = torch.empty_like(x)
    dgate, gate_parts = _new_gate_gradient(gate, num_rows, plan.chunk)
    parameters = weight, bias, input_bias
    parts = new_parts(x, 2 if input_bias is None else 3, plan.programs)
    inputs = [dense(t) for t in (dy, dtotal, x, gate, input_bias, weight, bias, cu_seqlens)]
    results = dx, dgate, gate_parts, parts
    sizes = num_rows, num_seqs or 0, search_steps(num_seqs or 0), plan.chunk, plan.group, plan.programs, width
    arguments = *inputs, mean, rstd, *results, *sizes
    launch(row_norm_backward, (plan.programs,), *arguments, ACTIVATION=activation, **plan.tile.options)
    if dgate is not None and gate_parts is not None and num_rows > plan.chunk:
        grid = (min(dgate.shape[0], _GATE_SUM_PROGRAMS), triton.cdiv(width, _GATE_SUM["COLS"]))
        arguments = gate_parts, dgate, dense(cu_seqlens), dgate.shape[0], plan.chunk, width
        launch(sum_gate_parts, grid, *arguments, **_GATE_SUM)
    return dx, dgate, parameter_gradients(parts, *parameters)


def _new_gate_gradient(gate: Tensor | None, num_rows: int, chunk: int) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the gradient of the gate [B, H] and for the parts that :func:`_gate_part` numbers."""
    if gate is None:
        return None, None
    gradient = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return gradient, gate.new_empty(2 * (num_rows // chunk + 1), gate.shape[1])


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``hbert_kernels::layer_norm``: ``(y, mean, rstd)``."""
    y, _, mean, rstd = _forward(x, weight, bias, eps)
    return y, mean, rstd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hbert_kernels::add_layer_norm``: ``(y, total, mean, rstd)``."""
    y, total, mean, rstd = _forward(x, weight, bias, eps, residual=residual)
    assert total is not None
    return y, total, mean, rstd


def layer_norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``hbert_kernels::layer_norm_backward``: ``(dx, dweight, dbias)``; for add_layer_norm, x is the total."""
    dx, _, (dweight, dbias, _) = _backward(dy, x, mean, rstd, weight, bias, dtotal=dtotal)
    return dx, dweight, dbias


def activation_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: int, input_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``hbert_kernels::activation_layer_norm``: ``(y, mean, rstd)``."""
    y, _, mean, rstd = _forward(x, weight, bias, eps, activation=activation, input_bias=input_bias)
    return y, mean, rstd


def activation_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    input_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hbert_kernels::activation_layer_norm_backward``: ``(dx, dweight, dbias, dinput_bias)``."""
    dx, _, (dweight, dbias, dinput_bias) = _backward(
        dy, x, mean, rstd, weight, bias, activation=activation, input_bias=input_bias
    )
    return dx, dweight, dbias, dinput_bias


def gated_layer_norm(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``hbert_kernels::gated_layer_norm``: ``(y, mean, rstd)``, zero in dead rows."""
    y, _, mean, rstd = _forward(x, weight, bias, eps, gate=gate, cu_seqlens=cu_seqlens)
    return y, mean, rstd


def gated_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hbert_kernels::gated_layer_norm_backward``: ``(dx, dgate, dweight, dbias)``."""
    dx, dgate, (dweight, dbias, _) = _backward(dy, x, mean, rstd, weight, bias, gate=gate, cu_seqlens=cu_seqlens)
    assert dgate is not None
    return dx, dgate, dweight, dbias
