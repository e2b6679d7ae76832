# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What kernels share: shapes of tiles, rows of a program, chunks of sequences, sums of partial gradients."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Parts of a parameter's gradient, and rows of a part: few parts cost little traffic, many fill a GPU.
MAX_PARTS = 512
MIN_ROWS = 8
_MIN_PROGRAMS, _MAX_ROWS = 2048, 64
_MAX_GROUP = 64


@dataclass(frozen=True)
class Tile:
    """Rows and columns (powers of two) that a program has in registers at once, and its warps."""

    rows: int
    cols: int
    num_warps: int

    @property
    def options(self) -> dict[str, int]:
        """The tile as keyword arguments of a launch."""
        return {"ROWS": self.rows, "COLS": self.cols, "num_warps": self.num_warps}


@dataclass(frozen=True)
class Plan:
    """How programs share out rows: each has ``group`` slots of up to ``chunk`` rows, a tile at a time."""

    tile: Tile
    chunk: int
    group: int
    programs: int


def tile_of(width: int, elements: int, per_thread: int, max_rows: int) -> Tile:
    """The tile of about ``elements`` values for rows of this width, on warps of 32 with ``per_thread`` in each."""
    cols = triton.next_power_of_2(width)
    rows = max(1, min(elements // cols, max_rows))
    return Tile(rows, cols, max(1, min(16, rows * cols // (32 * per_thread))))


def rows_of_program(num_rows: int, tile_rows: int) -> int:
    """Rows of a forward program: more than a tile only where there are programs to spare.

    Parameters are read once per program: at many rows that is next to nothing.
    """
    rows = tile_rows
    while rows < _MAX_ROWS and num_rows >= 2 * rows * _MIN_PROGRAMS:
        rows *= 2
    return rows


def slots_of(num_rows: int, num_seqs: int, chunk: int) -> int:
    """How many slots :func:`chunk_of_slot` maps to the chunks of all sequences and of the dead rows."""
    return num_rows // chunk + num_seqs + 1


def group_of(num_rows: int, slots: int, rows: int) -> int:
    """Slots of a program that should have ``rows`` rows: many for short sequences, one for long ones."""
    return max(1, min(_MAX_GROUP, slots * rows // max(1, num_rows)))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below ``value``."""
    return triton.cdiv(value, multiple) * multiple


def search_steps(num_seqs: int) -> int:
    """Steps that the search of :func:`chunk_of_slot` takes to find one of ``num_seqs + 1`` sequences."""
    return num_seqs.bit_length()


def dense(t: Tensor | None) -> Tensor | None:
    """``t`` with the strides that kernels expect."""
    return None if t is None else t.contiguous()


def new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for mean and rstd of the rows of x."""
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return mean, torch.empty_like(mean)


def new_parts(x: Tensor, parameters: int, num_parts: int) -> Tensor:
    """Memory for partial sums of the gradients of ``parameters`` rows as wide as x."""
    return torch.empty(parameters, num_parts, x.shape[1], dtype=torch.float32, device=x.device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: int | None) -> None:
    """Launch on the current device, unless there is no program to run."""
    if math.prod(grid) > 0:
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True, **constants)


@triton.jit
def load_parameter(P, cols, inside, FALLBACK: tl.constexpr):
    """The columns of a parameter in float32, ``FALLBACK`` everywhere for None."""
    if P is None:
        return tl.full(cols.shape, FALLBACK, tl.float32)
    else:
        return tl.load(P + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_part(PARTS, values, cols, inside, width, num_parts, WHICH: tl.constexpr):
    """The program's row of PARTS[WHICH], [num_parts, width]: the sum of the rows of ``values``."""
    part = tl.cast(WHICH * num_parts + tl.program_id(0), tl.int64)
    tl.store(PARTS + part * width + cols, tl.sum(values, 0), mask=inside)


@triton.jit
def chunk_of_slot(CU, slot, num_rows, num_seqs, search_steps, chunk):
    """Which rows, at most ``chunk``, a slot stands for: ``(seq, piece, first row, end)``, none if first >= end.

    Sequence b has the slots from ``cu[b] // chunk + b`` on, at least one and enough for its chunks, which are
    counted from its own start. Sequence ``num_seqs`` is that of the dead rows. ``slot`` may be a block.
    """
    slot = tl.cast(slot, tl.int32)
    seq = slot * 0
    last = seq + num_seqs
    for _ in range(search_steps):
        middle = (seq + last + 1) // 2
        found = tl.load(CU + middle) // chunk + middle <= slot
        seq = tl.where(found, middle, seq)
        last = tl.where(found, last, middle - 1)
    start = tl.load(CU + seq)
    end = tl.where(seq < num_seqs, tl.load(CU + tl.minimum(seq + 1, num_seqs)), num_rows)
    piece = slot - (start // chunk + seq)
    first = start + piece * chunk
    return seq, piece, first, tl.minimum(first + chunk, end)


@triton.jit
def _sum_rows(PARTS, OUT, num_parts, width, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The sum of the rows of PARTS [num_parts, width], always in the same order."""
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, num_parts, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < num_parts)[:, None] & (cols < width)[None, :]
        offsets = tl.cast(rows, tl.int64)[:, None] * width + cols[None, :]
        total += tl.load(PARTS + offsets, mask=mask, other=0.0)
    tl.store(OUT + cols, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=cols < width)


@triton.jit(do_not_specialize=["num_parts"])
def sum_parts(PARTS, DWEIGHT, DBIAS, DREST, num_parts, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Gradients of parameters from PARTS [2 + rest, num_parts, width]: weight, bias, then the rows of DREST."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    which = tl.program_id(1)
    parts = PARTS + tl.cast(which, tl.int64) * num_parts * width
    if which == 0:
        if DWEIGHT is not None:
            _sum_rows(parts, DWEIGHT, num_parts, width, cols, ROWS, COLS)
    elif which == 1:
        if DBIAS is not None:
            _sum_rows(parts, DBIAS, num_parts, width, cols, ROWS, COLS)
    else:
        if DREST is not None:
            _sum_rows(parts, DREST + (which - 2) * width, num_parts, width, cols, ROWS, COLS)


def parameter_gradients(
    parts: Tensor, weight: Tensor | None, bias: Tensor | None, rest: Tensor | None = None
) -> list[Tensor]:
    """The gradients of these parameters, in their dtypes; empty for None. ``rest`` may have several rows."""
    count, num_parts, width = parts.shape
    parameters = weight, bias, rest
    gradients = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    if any(gradient is not None for gradient in gradients):
        grid = (triton.cdiv(width, 32), count)
        launch(sum_parts, grid, parts, *gradients, num_parts, width, num_warps=4, ROWS=64, COLS=32)
    return [parts.new_empty(0) if gradient is None else gradient for gradient in gradients]
