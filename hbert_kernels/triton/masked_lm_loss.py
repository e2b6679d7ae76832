# mypy: allow-untyped-defs, allow-incomplete-defs
"""Masked-language-model loss in Triton: softmax cross-entropy in place of the logits, between products of torch.

Nothing is read on the host: rows without a label stay among the others and get zero loss and zero gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops._common import without_autocast
from ._common import launch

# Logits per chunk of rows: enough that the accumulation of dweight, a read and a write of [V, H] per chunk, is
# little beside its product.
_CHUNK_BYTES = 256_000_000
_IGNORED = torch.iinfo(torch.int64).min  # the label of a row that does not count: no number that a caller would give
_MAX_COLS, _ADD_COLS = 4096, 1024
_ALIGNED_COLS = 64  # rows of logits are padded to a multiple: for wide loads, and for the library's products


def block_columns(vocab: int) -> int:
    """Columns of a row that a program holds at a time."""
    return max(16, min(_MAX_COLS, triton.next_power_of_2(vocab)))


@triton.jit
def _load_logits(row, BIAS, columns, vocab, width):
    """Some logits of a row in float32, bias added; -infinity behind the last one.

    Loads are masked by the width, since a mask by an odd vocab would split them into single values.
    """
    mask = columns < width
    logits = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        logits += tl.load(BIAS + columns, mask=mask, other=0.0)
    return tl.where(columns < vocab, logits, -float("inf"))


@triton.jit
def row_softmax_cross_entropy(
    LOGITS, BIAS, LABELS, SCALE, LOSS, CORRECT, stride, vocab, width, smoothing,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, IGNORED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One row: read for the softmax, read again and written for the gradient; zeros behind ``vocab``."""
    index = tl.cast(tl.program_id(0), tl.int64)
    row = LOGITS + index * stride
    label = tl.load(LABELS + index)
    offsets = tl.arange(0, COLS)
    if label == IGNORED:
        tl.store(LOSS + index, 0.0)
        tl.store(CORRECT + index, 0)
        if GRADIENT:
            for first in range(0, width, COLS):
                columns = first + offsets
                tl.store(row + columns, tl.zeros([COLS], LOGITS.dtype.element_ty), mask=columns < width)
        return
    # A label that does not exist gives NaN.
    known = (label >= 0) & (label < vocab)
    target = tl.load(row + label, mask=known, other=float("nan")).to(tl.float32)
    if BIAS is not None:
        target += tl.load(BIAS + label, mask=known, other=0.0)
    largest = tl.full([COLS], -float("inf"), tl.float32)
    before_label = tl.full([COLS], -float("inf"), tl.float32)
    total = tl.zeros([COLS], tl.float32)
    deviations = tl.zeros([COLS], tl.float32)
    for first in range(0, vocab, COLS):
        columns = first + offsets
        logits = _load_logits(row, BIAS, columns, vocab, width)
        new = tl.maximum(largest, logits)
        # A lane has seen nothing yet where the largest is -infinity.
        seen = new > -float("inf")
        total = tl.where(seen, total * tl.exp(largest - new) + tl.exp(logits - new), total)
        total = tl.where(logits == logits, total, logits)
        largest = new
        before_label = tl.maximum(before_label, tl.where(columns < label, logits, -float("inf")))
        if SMOOTH:
            deviations += tl.where(columns < vocab, logits - target, 0.0)
    top = tl.max(largest, 0)
    total_of_row = tl.sum(tl.where(total > 0, total * tl.exp(largest - top), total), 0)
    # Relative to the largest logit: large ones do not cancel.
    loss = tl.log(total_of_row) - (target - top)
    if SMOOTH:
        loss -= smoothing * (tl.sum(deviations, 0) / vocab)
    tl.store(LOSS + index, loss)
    first_of_the_largest = (target == top) & (tl.max(before_label, 0) < top) & (total_of_row == total_of_row)
    tl.store(CORRECT + index, first_of_the_largest.to(tl.int64))
    if GRADIENT:
        scale = tl.load(SCALE)
        for first in range(0, width, COLS):
            columns = first + offsets
            gradient = tl.exp(_load_logits(row, BIAS, columns, vocab, width) - top) / total_of_row
            gradient -= tl.where(columns == label, 1.0 - smoothing, 0.0)
            if SMOOTH:
                gradient -= tl.where(columns < vocab, smoothing / vocab, 0.0)
            tl.store(row + columns, (gradient * scale).to(LOGITS.dtype.element_ty), mask=columns < width)


@triton.jit
def add_compensated(SUM, REMAINDER, TERM, size, COLS: tl.constexpr):
    """sum += term; what the rounding of the sum loses is kept in the remainder and added the next time."""
    places = tl.cast(tl.program_id(0), tl.int64) * COLS + tl.arange(0, COLS)
    mask = places < size
    exact = tl.load(TERM + places, mask=mask, other=0.0).to(tl.float32)
    if REMAINDER is not None:
        exact += tl.load(REMAINDER + places, mask=mask, other=0.0).to(tl.float32)
    exact += tl.load(SUM + places, mask=mask, other=0.0).to(tl.float32)
    rounded = exact.to(SUM.dtype.element_ty)
    tl.store(SUM + places, rounded, mask=mask)
    if REMAINDER is not None:
        tl.store(REMAINDER + places, (exact - rounded.to(tl.float32)).to(REMAINDER.dtype.element_ty), mask=mask)


def _cross_entropy(
    rows: Tensor, vocab: int, bias: Tensor | None, labels: Tensor, smoothing: float, scale: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """``rows`` and ``bias`` may be wider than ``vocab``."""
    count, width = rows.shape
    loss, correct = torch.empty(count, dtype=torch.float32, device=rows.device), torch.empty_like(labels)
    sizes = rows.stride(0), vocab, width, smoothing
    constants = {"SMOOTH": smoothing > 0, "GRADIENT": gradient, "IGNORED": _IGNORED, "COLS": block_columns(vocab)}
    tensors = rows, bias, labels, scale, loss, correct
    launch(row_softmax_cross_entropy, (count,), *tensors, *sizes, num_warps=8, **constants)
    return loss, correct


def softmax_cross_entropy_(
    logits: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, scale: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The op of the same name: (loss [M], correct [M]); the gradient times ``scale`` replaces the logits.

    A row with the smallest int64 as label does not count: zero loss, zero gradient. Other labels outside [0, V) give
    NaN as loss.
    """
    factor = torch.full((), scale, dtype=torch.float32, device=logits.device)
    return _cross_entropy(logits, logits.shape[1], bias, labels.contiguous(), label_smoothing, factor, gradient)


def accumulate_(sum: Tensor, remainder: Tensor | None, term: Tensor) -> None:
    """The op of the same name: sum += term, contiguous and of one size; ``remainder`` keeps what is lost."""
    grid = (triton.cdiv(sum.numel(), _ADD_COLS),)
    launch(add_compensated, grid, sum, remainder, term, sum.numel(), COLS=_ADD_COLS, num_warps=4)


def _divisor(num_masked: Tensor | None, ignored: Tensor) -> Tensor:
    """float64, on the device."""
    if num_masked is None:
        return (~ignored).sum().clamp(min=1).double()
    if num_masked.is_cpu:  # a number of the caller: a copy of it would wait for the device
        return torch.full((), float(num_masked), dtype=torch.float64, device=ignored.device)
    return num_masked.double()


class _WeightGradient:
    """dlogits^T hidden, summed over chunks in the weight's dtype, with compensation where that has 16 bits."""

    def __init__(self, weight: Tensor, chunks: int) -> None:
        # Not like the weight, which may be strided: sums go by the place in memory.
        self.total = weight.new_zeros(weight.shape) if chunks == 0 else weight.new_empty(weight.shape)
        compensated = chunks > 1 and weight.dtype != torch.float32
        self.remainder = torch.zeros_like(self.total) if compensated else None
        self.started = False

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        if hidden.dtype == self.total.dtype and self.remainder is None:
            self.total.addmm_(dlogits.t(), hidden, beta=1 if self.started else 0)
        elif self.started:
            accumulate_(self.total, self.remainder, dlogits.t() @ hidden)
        else:
            self.total.copy_(dlogits.t() @ hidden)
        self.started = True


@without_autocast
@torch.no_grad()
def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_masked: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op of the same name: loss, correct and the wanted gradients; an empty tensor for each of the others.

    In float16 the gradients are those of the sum of the losses.
    """
    ignored = labels == ignore_index
    # 0 * NaN would reach dweight.
    rows = hidden.masked_fill(ignored[:, None], 0)
    targets = labels.masked_fill(ignored, _IGNORED)
    divisor = _divisor(num_masked, ignored)
    scale = (torch.ones_like(divisor) if hidden.dtype == torch.float16 else divisor.reciprocal()).float()
    vocab, product_weight = weight.shape[0], weight.to(hidden.dtype)
    width = triton.cdiv(vocab, _ALIGNED_COLS) * _ALIGNED_COLS
    padded_bias = None if bias is None else F.pad(bias.float(), (0, width - vocab))
    size = max(1, _CHUNK_BYTES // (width * hidden.element_size()))
    chunks = list(zip(rows.split(size), targets.split(size), strict=True)) if len(rows) else []
    buffer = hidden.new_empty(min(size, len(rows)), width)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    correct = labels.new_zeros(())
    dhidden = hidden.new_empty(hidden.shape if wanted[0] else 0)
    dweight = _WeightGradient(weight, len(chunks)) if wanted[1] else None
    dbias = torch.zeros(vocab if wanted[2] else 0, dtype=torch.float32, device=hidden.device)
    for index, (chunk, chunk_targets) in enumerate(chunks):
        padded = buffer[: len(chunk)]
        logits = padded[:, :vocab]
        torch.mm(chunk, product_weight.t(), out=logits)
        loss, right = _cross_entropy(padded, vocab, padded_bias, chunk_targets, label_smoothing, scale, any(wanted))
        total += loss.sum(dtype=torch.float64)
        correct += right.sum()
        if wanted[0]:
            torch.mm(logits, product_weight, out=dhidden[index * size : index * size + len(chunk)])
        if dweight is not None:
            dweight.add(logits, chunk)
        if wanted[2]:
            dbias += logits.sum(0, dtype=torch.float32)
    dbias = dbias.to(hidden.dtype if bias is None else bias.dtype)
    total_dweight = weight.new_empty(0) if dweight is None else dweight.total
    return (total / divisor).float(), correct, dhidden, total_dweight, dbias
