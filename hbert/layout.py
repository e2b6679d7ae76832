"""What a layer sees of a batch: tokens, and how they attend to each other.

The model has one forward, written over a :class:`Layout`. Two layouts implement it:

* :class:`PackedLayout`: tokens [T, ...] without padding, run by the ops of hbert_kernels;
* :class:`DenseLayout`: padded [B, N, ...] with a mask, plain torch: for export (ONNX) and as the oracle of
  the tests.

Every per-token module (linear, norm, feed-forward) runs unchanged on both, because it looks at the last
dimension only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbert_kernels import additive_pool, attention
from hbert_kernels.nn import AdditiveAttention, ConvLayerNorm, HeadScorer, onloaded
from hbert_kernels.packing import Packing


class Layout(ABC):
    """The token order of one batch, and the three operations in which tokens meet.

    Attributes:
        positions: int64, the rank of each token among the valid tokens of its sequence.
        max_seqlen: upper bound of the sequence lengths.
        attentions: what each layer attended to, if the layout keeps it; see :class:`DenseLayout`.
    """

    positions: Tensor
    max_seqlen: int
    attentions: list[Tensor] | None = None

    @abstractmethod
    def pack(self, x: Tensor, fill: float = 0) -> Tensor:
        """Model inputs [B, N, ...] ([T, ...] if they came packed) -> tokens; invalid ones hold ``fill``."""

    @abstractmethod
    def unpack(self, x: Tensor) -> Tensor:
        """Tokens -> the shape of the model inputs, zeros where a token is not valid."""

    @abstractmethod
    def attend(self, qkv: Tensor, num_heads: int, dropout_p: float) -> Tensor:
        """Self-attention within each sequence: [..., 3H] = [q | k | v] -> [..., H]."""

    @abstractmethod
    def additive(self, module: AdditiveAttention, x: Tensor) -> Tensor:
        """Additive attention within each sequence, with the weights of ``module``: [..., H] -> [..., H]."""

    @abstractmethod
    def conv_norm(self, module: ConvLayerNorm, x: Tensor) -> Tensor:
        """LayerNorm, then the short convolution within each sequence: [..., H] -> [..., H]."""

    @abstractmethod
    def mean(self, x: Tensor) -> Tensor:
        """The mean of each sequence's tokens: [..., H] -> [B, H], zeros for an empty sequence."""

    @abstractmethod
    def first(self, x: Tensor) -> Tensor:
        """Each sequence's first token: [..., H] -> [B, H], zeros for an empty sequence."""


class PackedLayout(Layout):
    """Packed tokens [T, ...] and ``cu_seqlens``; see :class:`hbert_kernels.packing.Packing`."""

    def __init__(self, packing: Packing):
        self._packing = packing
        self.positions = packing.positions
        self.max_seqlen = packing.max_seqlen
        self._dead = self._dead_rows()

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [B+1], the first row of each sequence."""
        return self._packing.cu_seqlens

    @classmethod
    def from_mask(cls, mask: Tensor | None, shape: torch.Size, device: torch.device) -> PackedLayout:
        """The layout of a padded batch [B, N]; ``mask`` is bool, True = valid, or None (all valid)."""
        if mask is None:
            return cls(Packing.full(shape[0], shape[1], device))
        return cls(Packing.from_mask(mask))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> PackedLayout:
        """The layout of data that is already packed."""
        return cls(Packing.from_cu_seqlens(cu_seqlens, max_seqlen, num_tokens))

    def _dead_rows(self) -> Tensor | None:
        """bool [T] for data that came packed; None where the packing itself fills and drops the dead rows."""
        packing = self._packing
        if packing.shape is not None:
            return None
        return torch.arange(self.positions.shape[0], device=packing.cu_seqlens.device) >= packing.cu_seqlens[-1]

    def pack(self, x: Tensor, fill: float = 0) -> Tensor:
        if self._dead is None:
            return self._packing.pack(x, fill)
        # Dead rows meet no other row, but they do meet the lookups and the weight gradients: garbage must not
        # get there.
        return x.masked_fill(self._dead.view(-1, *[1] * (x.dim() - 1)), fill)

    def unpack(self, x: Tensor) -> Tensor:
        if self._dead is None:
            return self._packing.unpack(x)
        return x.masked_fill(self._dead[:, None], 0)

    def attend(self, qkv: Tensor, num_heads: int, dropout_p: float) -> Tensor:
        return attention(qkv, self.cu_seqlens, self.max_seqlen, num_heads, dropout_p=dropout_p)

    def additive(self, module: AdditiveAttention, x: Tensor) -> Tensor:
        return module.forward_packed(x, self.cu_seqlens, self.max_seqlen)

    def conv_norm(self, module: ConvLayerNorm, x: Tensor) -> Tensor:
        return module(x, self.cu_seqlens)

    def mean(self, x: Tensor) -> Tensor:
        # The softmax over equal scores is the mean.
        equal = x.new_zeros(1, x.shape[1])
        return additive_pool(x, equal, self.cu_seqlens, self.max_seqlen, num_heads=1).to(x.dtype)

    def first(self, x: Tensor) -> Tensor:
        start, end = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        if x.shape[0] == 0:
            return x.new_zeros(start.shape[0], x.shape[1])
        rows = x[start.clamp(max=x.shape[0] - 1).long()]
        return torch.where((start < end)[:, None], rows, rows.new_zeros(()))


class DenseLayout(Layout):
    """Padded tokens [B, N, ...] and a mask, in plain torch.

    Exact, and independent of hbert_kernels: softmax over masked scores, additive attention in its direct form
    with K. What stands under the mask enters as zeros and is multiplied by weights of exactly 0.

    Args:
        mask: bool [B, N], True = valid token; any pattern.
        keep_attentions: append to ``attentions``, for each layer in turn, weights [B, h, R, N] over the tokens
            of the sequence, zeros for tokens that are not valid. Self-attention: R = N, one row for each
            token. Additive attention: R = 2, the pooling of the global query (alpha) and of the global
            key (beta).
    """

    def __init__(self, mask: Tensor, keep_attentions: bool = False):
        self.mask = mask
        self.attentions = [] if keep_attentions else None
        self.max_seqlen = mask.shape[1]
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)

    def pack(self, x: Tensor, fill: float = 0) -> Tensor:
        return x.masked_fill(~self._mask_for(x), fill)

    def unpack(self, x: Tensor) -> Tensor:
        return self.pack(x)

    def _mask_for(self, x: Tensor) -> Tensor:
        return self.mask.view(*self.mask.shape, *[1] * (x.dim() - 2))

    def _softmax(self, scores: Tensor, dim: int, valid: Tensor) -> Tensor:
        """Softmax over the valid entries, in float32 or wider; the rest is exactly 0 where any is valid."""
        wide = torch.promote_types(scores.dtype, torch.float32)
        # The lowest finite number instead of -inf: a row that is all padding must not become 0/0.
        return scores.to(wide).masked_fill(~valid, torch.finfo(wide).min).softmax(dim).to(scores.dtype)

    def attend(self, qkv: Tensor, num_heads: int, dropout_p: float) -> Tensor:
        q, k, v = (_split_heads(part, num_heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = self._softmax(scores, -1, self.mask[:, None, None, :])
        if self.attentions is not None:
            self.attentions.append(weights.masked_fill(~self.mask[:, None, :, None], 0))
        return (F.dropout(weights, dropout_p) @ v).transpose(1, 2).flatten(-2)

    def additive(self, module: AdditiveAttention, x: Tensor) -> Tensor:
        with onloaded(module.query_att, module.key_att, module.norm):
            query = module.query(x)
            alpha = self._pooling_weights(module.query_att, query, module.num_heads)
            product = module.key(x) * _pool(query, alpha)
            beta = self._pooling_weights(module.key_att, product, module.num_heads)
            global_key = _pool(product, beta)
            if self.attentions is not None:
                self.attentions.append(torch.stack([alpha, beta], 1).permute(0, 3, 1, 2))
            gated = query * global_key
            return module.transform(gated if module.norm is None else _plain_norm(module.norm, gated)) + query

    def _pooling_weights(self, scorer: nn.Module, x: Tensor, num_heads: int) -> Tensor:
        """Weights [B, N, h] over the tokens of a sequence; all zeros for an empty one."""
        scores = _scores(scorer, x, num_heads)
        valid = self._mask_for(scores)
        return self._softmax(scores, 1, valid).masked_fill(~valid, 0)

    def conv_norm(self, module: ConvLayerNorm, x: Tensor) -> Tensor:
        with onloaded(module):
            y, taps = _plain_norm(module, x), module.conv_weight
        batch, length, width = y.shape
        radius = taps.shape[0] // 2
        # Neighbours are the neighbouring valid tokens: rows are compacted first, padding goes to a slot
        # behind the row.
        slot = torch.where(self.mask, self.positions, length)
        rows = y.new_zeros(batch, length + 1, width).scatter(1, _as_index(slot, y), y)[:, :length]
        rows = F.pad(rows, (0, 0, radius, radius))
        mixed = torch.stack([tap * rows[:, j : j + length] for j, tap in enumerate(taps)]).sum(0)
        return y + torch.gather(mixed, 1, _as_index(self.positions, y))

    def mean(self, x: Tensor) -> Tensor:
        count = self.mask.sum(1, keepdim=True).clamp(min=1)
        wide = torch.promote_types(x.dtype, torch.float32)
        return (self.pack(x).sum(1, dtype=wide) / count).to(x.dtype)

    def first(self, x: Tensor) -> Tensor:
        start = self.mask.long().argmax(1)
        return self.pack(x)[torch.arange(x.shape[0], device=x.device), start]


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def _pool(x: Tensor, weights: Tensor) -> Tensor:
    """Each head's weighted sum of its own slice: x [B, N, H], weights [B, N, h] -> [B, 1, H]."""
    slices = _split_heads(x, weights.shape[-1])
    return torch.einsum("bnh,bnhd->bhd", weights, slices).flatten(1).unsqueeze(1)


def _as_index(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand_as(like)


def _scores(scorer: nn.Module, x: Tensor, num_heads: int) -> Tensor:
    """Scores [B, N, h] / sqrt(d): dense scorer (Linear H -> h), or one vector a head (weight [h, d])."""
    slices = _split_heads(x, num_heads)
    raw = (slices * scorer.weight).sum(-1) if isinstance(scorer, HeadScorer) else scorer(x)
    return raw * slices.shape[-1] ** -0.5


def _plain_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
