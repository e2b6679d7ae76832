"""Masked-language-model loss: the decoder linear and the softmax cross-entropy on the masked rows only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import _check, _dispatch
from ._common import cast, compute_dtype, without_autocast


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
            gradients are accumulated or summed over processes. None: the rows counted here (1 if there are none).

    Returns:
        ``(loss, correct)``: the loss, a float32 scalar (float64 for float64), and the number of rows whose largest
        logit is the label, an int64 scalar without gradient.

    Raises:
        TypeError: unsupported dtype of activations, parameters or labels.
        ValueError: a shape or device does not fit, label_smoothing is not in [0, 1), or a label is not in [0, V).
    """
    op = "masked_lm_loss"
    _check.packed(op, "hidden", hidden)
    _check.floating(op, hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{op}: weight must be [V, {hidden.shape[1]}], got shape {tuple(weight.shape)}")
    _check.shape(op, "bias", bias, weight.shape[0])
    _check.labels(op, labels, hidden.shape[0], weight.shape[0], ignore_index)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    _dispatch.select(op, hidden, weight, bias)
    return masked_lm_loss_reference(hidden, weight, bias, labels, ignore_index, label_smoothing, num_masked)


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
    counted = labels != ignore_index
    divisor = counted.sum().clamp(min=1) if num_masked is None else num_masked
    correct = (logits.argmax(-1) == labels) & counted
    return total / divisor, correct.sum()
