"""Masked-language-model loss: the decoder linear and the softmax cross-entropy on the masked rows only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import cast, compute_dtype, run, without_autocast


def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_masked: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean cross-entropy of ``softmax(hidden @ weight.T + bias)`` against the labels (Devlin et al. 2019, sec. 3.1).

    Args:
        hidden: [M, H], the rows to predict (gather the masked rows first); float32, bfloat16 or float64 (float16 on
            GPUs).
        weight: [V, H], the decoder, usually tied to the word embeddings.
        bias: [V] or None.
        labels: int64 [M], the true ids; rows with ``ignore_index`` do not count.
        label_smoothing: share of the uniform distribution in the target, in [0, 1).
        num_masked: what the summed loss is divided by: the number of masked tokens of the *global* batch when
            gradients are accumulated or summed over processes. A tensor has one element, on the CPU or where hidden is.
            None: the rows counted here (1 if there are none).

    Returns:
        ``(loss, correct)``: the loss, a float32 scalar (float64 for float64), and the number of rows whose largest
        logit is the label, an int64 scalar without gradient.

    Raises:
        TypeError: unsupported dtype of activations, parameters or labels.
        ValueError: a shape or device does not fit, the vocabulary is empty, label_smoothing is not in [0, 1),
            num_masked is a number below 1, a tensor of more numbers than one, of another device or one that requires
            a gradient, or a label is not in [0, V).
    """
    op = "masked_lm_loss"
    _check.packed(op, "hidden", hidden)
    _check.floating(op, hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{op}: weight must be [V, {hidden.shape[1]}], got shape {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: the vocabulary is empty: weight has shape {tuple(weight.shape)}")
    _check.shape(op, "bias", bias, weight.shape[0])
    _check.labels(op, labels, hidden, weight.shape[0], ignore_index)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if isinstance(num_masked, int) and num_masked < 1:
        raise ValueError(f"{op}: num_masked must be at least 1, got {num_masked}")
    if isinstance(num_masked, Tensor):
        _check.divisor(op, "num_masked", num_masked, hidden.device)
        num_masked = num_masked.reshape(())
    if _dispatch.select(op, hidden, weight, bias) == "reference":
        return masked_lm_loss_reference(hidden, weight, bias, labels, ignore_index, label_smoothing, num_masked)
    if num_masked is not None and not isinstance(num_masked, Tensor):
        num_masked = torch.full((), num_masked, dtype=torch.float64, device="cpu")
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    arguments = (hidden, weight, bias, labels, num_masked, ignore_index, label_smoothing, wanted)
    return run(_MaskedLMLoss, torch.ops.hbert_kernels.masked_lm_loss, *arguments, outputs=2)


@without_autocast
def masked_lm_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    num_masked: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """Plain torch, any device, float64-capable, differentiable, exportable; holds the [M, V] logits."""
    logits = F.linear(hidden, weight.to(hidden.dtype), cast(bias, hidden.dtype)).to(compute_dtype(hidden))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum")
    correct = (logits.argmax(-1) == labels) & (labels != ignore_index)
    return (total / _divisor(labels, ignore_index, num_masked)).to(total.dtype), correct.sum()


def _divisor(labels: Tensor, ignore_index: int, num_masked: Tensor | int | None) -> Tensor | int:
    """What the summed loss is divided by."""
    return (labels != ignore_index).sum().clamp(min=1) if num_masked is None else num_masked


def _masked_lm_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_masked: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = [
        hidden.new_empty(0) if t is None else t.new_empty(t.shape if w else 0)
        for t, w in zip((hidden, weight, bias), wanted, strict=True)
    ]
    loss, correct = hidden.new_empty((), dtype=compute_dtype(hidden)), labels.new_empty(())
    return loss, correct, gradients[0], gradients[1], gradients[2]


def _softmax_cross_entropy_fake(
    logits: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, scale: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)), labels.new_empty(labels.shape)


def _accumulate_fake(sum: Tensor, remainder: Tensor | None, term: Tensor) -> None:
    return None


# The gradients are those of the loss; where hidden is float16, those of the sum of the losses: divided by the number of
# masked tokens, and not yet times the loss scale, they would be lost below float16's smallest number.
_library.define(
    "masked_lm_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? num_masked, int ignore_index,"
    " float label_smoothing, bool[3] wanted)"
    " -> (Tensor loss, Tensor correct, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _masked_lm_loss_fake,
)
_library.define(
    "softmax_cross_entropy_(Tensor(a!) logits, Tensor? bias, Tensor labels, float label_smoothing, float scale,"
    " bool gradient) -> (Tensor loss, Tensor correct)",
    _softmax_cross_entropy_fake,
)
_library.define("accumulate_(Tensor(a!) sum, Tensor(b!)? remainder, Tensor term) -> ()", _accumulate_fake)
_dispatch.register("masked_lm_loss", "cpp", _dispatch.cpp_refusal)

# Logits per chunk. Smaller chunks make the accumulation of dweight, a read and a write of [V, H] each, dominate its
# product; where one chunk is enough there is none, and no compensation term either.
_CHUNK_BYTES = 40_000_000
_MIN_CHUNK_ROWS = 64
_BIAS_BLOCK_ROWS = 64  # of logits per partial sum of dbias: the library widens a bfloat16 operand as a whole
_ALIGNED_ELEMENTS = 16  # logits rows start at cache lines: up to 1.3x for the library's float32 product
_WEIGHT_BLOCK_ROWS = 8192  # of dweight per partial product: smaller ones cost more in parallel regions than they save


def _chunk_bounds(rows: int, vocab: int, itemsize: int) -> list[tuple[int, int]]:
    """Row ranges of nearly equal size, a pure function of the shapes."""
    # In float32 a further chunk costs one more pass over dweight, in bfloat16 also a compensation term of its size.
    budget = _CHUNK_BYTES if itemsize == 2 else _CHUNK_BYTES * 3 // 4
    limit = max(_MIN_CHUNK_ROWS, budget // (vocab * itemsize))
    count = -(-rows // limit)
    size = -(-rows // max(count, 1))
    return [(begin, min(begin + size, rows)) for begin in range(0, rows, max(size, 1))]


def _logits_buffer(like: Tensor, rows: int, vocab: int) -> Tensor:
    # The bfloat16 product would go through a dense copy of strided logits.
    align = 1 if like.dtype == torch.bfloat16 else _ALIGNED_ELEMENTS
    return like.new_empty(rows, -(-vocab // align) * align)[:, :vocab]


class _Gradients:
    """dhidden, dweight and dbias, summed over the chunks; an empty tensor for what is not wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], chunks: int) -> None:
        acc, dtype = compute_dtype(hidden), hidden.dtype
        self.wanted = wanted
        self.hidden = hidden.new_empty(hidden.shape if wanted[0] else 0)
        # The library adds to what it wrote before; in bfloat16 that would round at every chunk.
        self.in_place = weight.dtype == dtype and (dtype != torch.bfloat16 or chunks == 1)
        self.weight = weight.new_empty(weight.shape if wanted[1] else 0)
        if chunks == 0:
            self.weight.zero_()
        compensated = wanted[1] and chunks > 1 and weight.dtype == torch.bfloat16
        self.remainder = torch.zeros_like(self.weight) if compensated else None
        self.bias = hidden.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=acc)

    def add(self, begin: int, end: int, dlogits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Rows [begin, end) of the batch."""
        if self.wanted[0]:
            torch.mm(dlogits, weight, out=self.hidden[begin:end])
        if self.wanted[1]:
            self._add_weight(dlogits, hidden, begin == 0)
        if self.wanted[2]:
            for block in dlogits.split(_BIAS_BLOCK_ROWS):
                self.bias += block.sum(0, dtype=self.bias.dtype)

    def _add_weight(self, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
        if self.in_place:
            self.weight.addmm_(dlogits.t(), hidden, beta=0 if first else 1)
            return
        for begin in range(0, self.weight.shape[0], _WEIGHT_BLOCK_ROWS):
            block = slice(begin, begin + _WEIGHT_BLOCK_ROWS)
            partial = torch.mm(dlogits[:, block].t(), hidden)
            if first:
                self.weight[block] = partial
            else:
                remainder = None if self.remainder is None else self.remainder[block]
                torch.ops.hbert_kernels.accumulate_(self.weight[block], remainder, partial)


@torch.library.impl("hbert_kernels::masked_lm_loss", "CPU")
@without_autocast
@torch.no_grad()
def _masked_lm_loss_cpu(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_masked: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = (labels != ignore_index).nonzero().flatten()
    divisor = max(1, len(kept)) if num_masked is None else float(num_masked)
    rows, targets = hidden, labels.contiguous()
    if len(kept) < len(labels):
        rows, targets = hidden[kept], targets[kept]
    # Under autocast the weight is wider than the activations: one cast per call, not one per chunk.
    product_weight, product_bias = weight.to(hidden.dtype), cast(bias, compute_dtype(hidden))
    product_bias = None if product_bias is None else product_bias.contiguous()
    vocab = weight.shape[0]
    bounds = _chunk_bounds(len(kept), vocab, hidden.element_size())
    gradients = _Gradients(rows, weight, bias, wanted, len(bounds))
    buffer = _logits_buffer(rows, max((end - begin for begin, end in bounds), default=0), vocab)
    scale = 1 / divisor if divisor else torch.inf
    total = torch.zeros((), dtype=torch.float64)
    correct = labels.new_zeros(())
    for begin, end in bounds:
        logits = buffer[: end - begin]
        torch.mm(rows[begin:end], product_weight.t(), out=logits)
        loss, right = torch.ops.hbert_kernels.softmax_cross_entropy_(
            logits, product_bias, targets[begin:end], label_smoothing, scale, any(wanted)
        )
        total += loss.sum(dtype=torch.float64)
        correct += right.sum()
        gradients.add(begin, end, logits, rows[begin:end], product_weight)
    dhidden = gradients.hidden
    if wanted[0] and len(kept) < len(labels):
        dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, kept, dhidden)
    dbias = gradients.bias.to(hidden.dtype if bias is None else bias.dtype)
    return (total / divisor).to(compute_dtype(hidden)), correct, dhidden, gradients.weight, dbias


class _MaskedLMLoss(torch.autograd.Function):
    """The forward pass has the logits at hand and makes the gradients too; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        num_masked: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor]:
        options = (ignore_index, label_smoothing, wanted)
        loss, correct, *gradients = torch.ops.hbert_kernels.masked_lm_loss(
            hidden, weight, bias, labels, num_masked, *options
        )
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(hidden, weight, bias, labels, num_masked)
        ctx.options, ctx.gradients = options, gradients
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Not among the saved tensors: a second reference would make autograd copy [V, H] into .grad. A second backward
        # pass over a retained graph makes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = torch.ops.hbert_kernels.masked_lm_loss(*ctx.saved_tensors, *ctx.options)[2:]
        if gradients[0].dtype == torch.float16:
            _, _, _, labels, num_masked = ctx.saved_tensors
            # With a dimension, so that the product is one of float32: a GPU would round a scalar to float16 first.
            dloss = (dloss / _divisor(labels, ctx.options[0], num_masked)).float().reshape(1)
        # Its value is read only where that costs no device synchronisation.
        if not _check.may_read_values(dloss) or dloss != 1:
            gradients = [g.mul_(dloss) for g in gradients]
        return *(g if w else None for g, w in zip(gradients, ctx.options[2], strict=True)), *[None] * 5
