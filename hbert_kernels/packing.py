"""From padded batches to packed tokens and back.

Kernels never see a mask: they take packed tokens [T, H] and ``cu_seqlens`` [B+1]. A :class:`Packing` is computed once
per batch from the attention mask and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check
from .ops._common import segment_ids


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded [B, N] batch lie in the packed order.

    Two forms, with the same meaning for the kernels:

    * packed: T is the number of valid tokens. Reading it synchronises a GPU once.
    * static: valid tokens come first, T = B*N, the rest of the rows is dead. No shape depends on data, so that it can
      be compiled, exported and captured in a CUDA graph.

    Attributes:
        cu_seqlens: int32 [B+1], the first row of each sequence.
        max_seqlen: an upper bound of the sequence lengths.
        positions: int64 [T], the rank of each token among the valid tokens of its sequence; 0 in dead rows.
        shape: (B, N), or None if the data came packed.
        indices: int64 [T], the row in the flattened padded batch of each packed row; None: the identity.
        mask: bool [B, N] of valid tokens; None: all are valid.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    shape: tuple[int, int] | None
    indices: Tensor | None = None
    mask: Tensor | None = None

    @staticmethod
    def full(batch: int, length: int, device: torch.device | str | None = None) -> Packing:
        """The packing of a batch without padding."""
        cu = torch.arange(batch + 1, device=device, dtype=torch.int32) * length
        positions = torch.arange(length, device=device).repeat(batch)
        return Packing(cu, length, positions, (batch, length))

    @staticmethod
    def from_mask(mask: Tensor, static: bool | None = None) -> Packing:
        """The packing of a padded batch.

        Args:
            mask: bool [B, N], True = valid token. Any pattern: left or right padding, holes, empty rows.
            static: the static form; None: static while compiling or exporting and of a meta or fake mask, packed
                otherwise.

        Raises:
            TypeError: the mask is not bool.
            ValueError: the mask has not two dimensions, or no values for the packed form.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"Packing: the mask must be bool (True = valid token), got {mask.dtype}")
        if mask.dim() != 2:
            raise ValueError(f"Packing: the mask must be [B, N], got shape {tuple(mask.shape)}")
        if static is None:
            static = not _check.has_values(mask)
        elif not static and not _check.has_values(mask):
            hint = "while compiling use static=True, also for meta and fake masks"
            raise ValueError(f"Packing: the packed form has data-dependent shapes; {hint}")
        batch, length = mask.shape
        if not static and bool(mask.all()):
            return Packing.full(batch, length, mask.device)
        flat = mask.flatten()
        indices = torch.argsort(~flat, stable=True) if static else flat.nonzero().squeeze(1)
        lengths = torch.cat([mask.new_zeros(1, dtype=torch.int32), mask.sum(1, dtype=torch.int32)])
        rank = (mask.cumsum(1) - 1).masked_fill(~mask, 0).flatten()[indices]
        longest = length if static else int(lengths.max())
        return Packing(lengths.cumsum(0, dtype=torch.int32), longest, rank, (batch, length), indices, mask)

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Packing:
        """The packing of data that is already packed: ``num_tokens`` = T rows, those behind cu_seqlens[-1] dead.

        Raises:
            TypeError: cu_seqlens is not an int32 tensor.
            ValueError: it is not [B+1], not increasing from 0, or reaches beyond T; or a sequence exceeds max_seqlen.
        """
        _check.cu_seqlens("Packing", cu_seqlens, num_tokens, cu_seqlens.device, max_seqlen)
        start = torch.cat([cu_seqlens[:-1], cu_seqlens.new_zeros(1)])[segment_ids(cu_seqlens, num_tokens)]
        token = torch.arange(num_tokens, device=cu_seqlens.device)
        positions = torch.where(token < cu_seqlens[-1], token - start, 0)
        return Packing(cu_seqlens, max_seqlen, positions, None)

    def pack(self, x: Tensor, fill: float = 0) -> Tensor:
        """Padded [B, N, ...] -> packed [T, ...], ``fill`` in dead rows."""
        if self.shape is None or tuple(x.shape[:2]) != self.shape:
            raise ValueError(
                f"Packing.pack: expected a tensor [B, N, ...] with (B, N) = {self.shape}, got {tuple(x.shape)}"
            )
        flat = x.flatten(0, 1)
        if self.indices is None or self.mask is None:
            return flat
        rows = flat[self.indices]
        if rows.shape[0] != flat.shape[0]:
            return rows
        # Static form. Dead rows get zero gradients, but 0 * NaN would still reach the weight gradients.
        keep = self.mask.flatten()[self.indices].view(-1, *[1] * (rows.dim() - 1))
        return torch.where(keep, rows, rows.new_full((), fill))

    def unpack(self, x: Tensor) -> Tensor:
        """Packed [T, ...] -> padded [B, N, ...], zeros where the mask is False."""
        if self.shape is None:
            raise ValueError("Packing.unpack: the data came packed, there is no padded shape to go back to")
        if x.shape[0] != self.positions.shape[0]:
            raise ValueError(f"Packing.unpack: expected {self.positions.shape[0]} packed rows, got {x.shape[0]}")
        if self.indices is not None and self.mask is not None:
            rows = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.indices, x)
            keep = self.mask.flatten().view(-1, *[1] * (x.dim() - 1))
            x = torch.where(keep, rows, rows.new_zeros(()))
        return x.unflatten(0, self.shape)
