"""A token embedding of int8 numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbert_kernels import quantize_rows


class Int8Embedding(nn.Module):
    """Row v of the table is ``scale[v] * values[v]``: a quarter of the memory, and float32 rows when asked for.

    Args:
        source: the embedding; its rows are quantised one by one (:func:`hbert_kernels.quantize_rows`).
    """

    values: Tensor
    scale: Tensor

    def __init__(self, source: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        values, scale = quantize_rows(source.weight.detach().float())
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ids of any shape -> float32 [..., H]."""
        return self.values[ids].to(torch.float32).mul_(self.scale[ids].unsqueeze(-1))
