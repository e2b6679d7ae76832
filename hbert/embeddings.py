"""Token, position and token-type embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbert_kernels.nn import AddLayerNorm, onloaded

from .config import HBertConfig
from .inputs import check_range
from .layout import Layout


def sinusoidal_table(length: int, width: int) -> Tensor:
    """Fixed position embeddings, float32 [length, width] (Vaswani et al. 2017, section 3.5).

    ``table[p, 2i] = sin(p / 10000^(2i/width))`` and ``table[p, 2i+1] = cos(p / 10000^(2i/width))``, computed
    in float64.
    """
    position = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1)
    even = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
    angle = position / 10000.0 ** (even / width)
    table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return table[:, :width].float()


class HBertEmbeddings(nn.Module):
    """``Dropout(LN(word + position [+ token type]))`` for the tokens of a layout."""

    position_table: Tensor | None

    def __init__(self, config: HBertConfig):
        super().__init__()
        hidden, length = config.hidden_size, config.max_position_embeddings
        self.max_position_embeddings = length
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        learned = config.positions == "learned"
        self.position_embeddings = nn.Embedding(length, hidden) if learned else None
        table = None if learned else torch.empty(length, hidden)
        self.register_buffer("position_table", table, persistent=False)
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, hidden) if types else None
        self.norm = AddLayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """Ids in the token order of ``layout`` -> [..., H].

        ``position_ids`` default to each token's rank among the valid tokens of its sequence.

        Raises:
            ValueError: a sequence is longer than the position table, or an id is out of range.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            check_range("input_ids", input_ids, self.word_embeddings.num_embeddings)
            inputs_embeds = self.word_embeddings(input_ids)
        if self.token_type_embeddings is not None:
            inputs_embeds = inputs_embeds + self._token_types(token_type_ids)
        y, _ = self.norm(inputs_embeds, self._positions(position_ids, layout))
        return self.dropout(y)

    def _token_types(self, token_type_ids: Tensor | None) -> Tensor:
        table = self.token_type_embeddings
        assert table is not None
        if token_type_ids is None:
            with onloaded(table):
                return table.weight[0]
        check_range("token_type_ids", token_type_ids, table.num_embeddings)
        return table(token_type_ids.long())

    def _positions(self, position_ids: Tensor | None, layout: Layout) -> Tensor:
        length = self.max_position_embeddings
        if position_ids is None:
            if layout.max_seqlen > length:
                raise ValueError(f"sequence length {layout.max_seqlen} exceeds max_position_embeddings {length}")
            position_ids = layout.positions
        check_range("position_ids", position_ids, length)
        if self.position_embeddings is not None:
            return self.position_embeddings(position_ids.long())
        assert self.position_table is not None
        return self.position_table[position_ids.long()]
