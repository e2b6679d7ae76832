"""The core of additive attention in its K-free form, on weights of inference."""

from __future__ import annotations

import torch
from torch import Tensor

from hbert.layout import PackedLayout

from .arithmetic import Affine, Arithmetic, Packed, own
from .kernels import AdditiveCore


class KeyFree:
    """``additive_attention(..., form="key_free")`` of :mod:`hbert_kernels`; the same to rounding.

    Its two products of h rows a sequence with the key's weight take longer to read the weight than to compute. Where
    ``ops.packs_key_free``, they are products of packed weights: that of the key, which the direct form has too (each
    head takes its slice of the result, so that h times the products are computed), and the transposed one.

    Args:
        key: weight and bias of the key's projection, as the layer's input wants them.
        packed_key: the same packed, as the layer's rows want it.
        scale: what makes rows of the layer's input.
    """

    def __init__(self, core: AdditiveCore, key: Affine, packed_key: Packed, scale: Tensor | None, ops: Arithmetic):
        weight, bias = key
        self.core, self.packed_key, self.scale = core, packed_key, scale
        self.packs = ops.packs_key_free
        if self.packs:
            self.scorers = ops.pack(weight.detach().t().contiguous(), None)
            self.key_att = _whole_rows(core.key_att, weight.shape[0])
        else:
            self.key = own(weight, ops.dtype), None if bias is None else own(bias)

    def __call__(self, query: Tensor, x: Tensor, ops: Arithmetic, layout: PackedLayout) -> Tensor:
        if not self.packs:
            return ops.kernels.additive_attention(query, x, self.core, self.key, layout)
        kernels = ops.kernels
        g = kernels.additive_pool(query, self.core.query_att, self.core, layout, full=False)
        scorers = self._product(self.scorers, kernels.gated_scorers(g, self.key_att), None, ops)
        pooled = kernels.additive_pool(x, scorers, self.core, layout, full=True)
        key = kernels.own_slices(self._product(self.packed_key, pooled, self.scale, ops))
        return kernels.gate(query, g * key, self.core, layout)

    def _product(self, layer: Packed, x: Tensor, scale: Tensor | None, ops: Arithmetic) -> Tensor:
        """[B, h, H] through a linear layer, float32."""
        rows = ops.rows(ops.kernels.rows_of_heads(x, ops.dtype), scale)
        return ops.kernels.heads_of_rows(ops.linear(layer, rows), self.core.num_heads)


def _whole_rows(scorer: Tensor, hidden: int) -> Tensor:
    """[h, H] from scorers of either kind: those [h, d] of each head's slice have zeros elsewhere."""
    return scorer if scorer.shape[1] == hidden else torch.block_diag(*scorer)
