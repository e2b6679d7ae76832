"""Checks of what a model is called with, and the layout that follows from it.

Values (of ids, positions and labels) are read where that costs no device synchronisation: in eager mode on
the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import DenseLayout, Layout, PackedLayout

_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def build_layout(
    tokens: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    dense: bool,
    keep_attentions: bool = False,
) -> Layout:
    """The layout of a batch.

    Args:
        tokens: [B, N, ...], or [T, ...] together with ``cu_seqlens``; only shape and device are used.
        attention_mask: bool or integer [B, N], nonzero = valid token; None: all are valid.
        cu_seqlens, max_seqlen: for data that is already packed.
        dense: build a :class:`DenseLayout`.
        keep_attentions: the same, and it keeps what the layers attend to.

    Raises:
        TypeError: dtype of the mask or of cu_seqlens.
        ValueError: shapes or devices do not fit, or the arguments contradict each other.
    """
    if cu_seqlens is not None:
        others = {
            "attention_mask": attention_mask is not None,
            "output_attentions=True": keep_attentions,
            'attn_implementation="eager"': dense,
        }
        if clash := [name for name, given in others.items() if given]:
            raise ValueError(f"cu_seqlens cannot be combined with {clash[0]}: packed data has no padding")
        return _packed_layout(tokens, cu_seqlens, max_seqlen)
    if max_seqlen is not None:
        raise ValueError("max_seqlen needs cu_seqlens: it describes data that is already packed")
    if tokens.dim() < 2:
        raise ValueError(f"inputs must be [B, N], or packed [T] with cu_seqlens; got {tuple(tokens.shape)}")
    mask = None if attention_mask is None else _bool_mask(attention_mask, tokens)
    if not dense and not keep_attentions:
        return PackedLayout.from_mask(mask, tokens.shape[:2], tokens.device)
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return DenseLayout(mask, keep_attentions)


def _packed_layout(tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> PackedLayout:
    if max_seqlen is None:
        raise ValueError("cu_seqlens needs max_seqlen, the length of the longest sequence as an integer")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise TypeError(f"cu_seqlens must be int32 [B+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    return PackedLayout.from_cu_seqlens(cu_seqlens, max_seqlen, tokens.shape[0])


def _bool_mask(mask: Tensor, tokens: Tensor) -> Tensor:
    if mask.dtype != torch.bool and mask.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"attention_mask must be bool or integer (nonzero = valid token), got {mask.dtype}")
    expected = tuple(tokens.shape[:2])
    if mask.shape != expected:
        raise ValueError(f"attention_mask must be [B, N] = {expected}, got shape {tuple(mask.shape)}")
    if mask.device != tokens.device:
        raise ValueError(f"attention_mask is on {mask.device}, the inputs are on {tokens.device}")
    return mask if mask.dtype == torch.bool else mask != 0


def check_token_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, packed: bool, hidden_size: int
) -> Tensor:
    """The one of the two that was given: integer [B, N] ([T] if packed), or floating [B, N, H] ([T, H]).

    Raises:
        ValueError: not exactly one was given, or a wrong shape. TypeError: a wrong dtype.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    axes = "[T" if packed else "[B, N"
    if input_ids is not None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        if input_ids.dim() != (1 if packed else 2):
            raise ValueError(f"input_ids must be {axes}], got shape {tuple(input_ids.shape)}")
        return input_ids
    assert inputs_embeds is not None
    if not inputs_embeds.is_floating_point():
        raise TypeError(f"inputs_embeds must be floating, got {inputs_embeds.dtype}")
    if inputs_embeds.dim() != (2 if packed else 3) or inputs_embeds.shape[-1] != hidden_size:
        raise ValueError(f"inputs_embeds must be {axes}, {hidden_size}], got {tuple(inputs_embeds.shape)}")
    return inputs_embeds


def per_token(name: str, t: Tensor | None, like: Tensor) -> Tensor | None:
    """``t``, None or as in :func:`check_shape`; one row [1, N] stands for all rows of a padded batch.

    Raises:
        TypeError: not an integer tensor. ValueError: another shape.
    """
    shape = _token_shape(like)
    if t is not None and len(shape) == 2 and t.shape == (1, shape[1]):
        t = t.expand(shape)
    check_shape(name, t, like)
    return t


def _token_shape(main: Tensor) -> torch.Size:
    return main.shape[:-1] if main.is_floating_point() else main.shape


def check_shape(name: str, t: Tensor | None, like: Tensor) -> None:
    """``t`` is None, or integer with the token axes of ``like``, the model's main input.

    Raises:
        TypeError: not an integer tensor. ValueError: another shape.
    """
    if t is None:
        return
    if t.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name} must be an integer tensor, got {t.dtype}")
    expected = _token_shape(like)
    if t.shape != expected:
        raise ValueError(f"{name} must have the shape of the inputs, {tuple(expected)}, got {tuple(t.shape)}")


def check_labels(labels: Tensor, like: Tensor | None) -> None:
    """``labels`` are int64 with the token axes of ``like``, the model's main input.

    Raises:
        TypeError: not int64. ValueError: another shape.
    """
    assert like is not None
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    check_shape("labels", labels, like)


def check_masked_positions(positions: Tensor | None, labels: Tensor, attention_mask: Tensor | None) -> None:
    """``positions`` are None, or int64 [M] and point into the flattened ``labels``.

    Raises:
        TypeError: not an int64 vector. ValueError: one is out of range (CPU, eager), or there is an
        attention_mask: the labels that it hides do not count.
    """
    if positions is None:
        return
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise TypeError(f"masked_positions must be int64 [M], got {positions.dtype} {tuple(positions.shape)}")
    if attention_mask is not None:
        raise ValueError("masked_positions cannot be combined with attention_mask: use packed inputs")
    check_range("masked_positions", positions, labels.numel())


def is_readable(t: Tensor) -> bool:
    """Whether a check may look at values: in eager mode on the CPU."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(name: str, ids: Tensor, size: int, ignore_index: int | None = None) -> None:
    """All ``ids`` (but ``ignore_index``) are in [0, size).

    Raises:
        ValueError: some are not; the message names the range found.
    """
    if not is_readable(ids) or ids.numel() == 0:
        return
    kept = ids if ignore_index is None else ids[ids != ignore_index]
    if kept.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(kept))
    if low < 0 or high >= size:
        ignored = "" if ignore_index is None else f" or {ignore_index}"
        raise ValueError(f"{name} must be in [0, {size}){ignored}, found values from {low} to {high}")
