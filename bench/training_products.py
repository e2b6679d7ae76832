"""The matrix products of one training step of our masked language models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from bench.ops import Gemm
from bench.ops.attention import PRODUCTS
from hbert.layers import HBertSelfAttention
from hbert.modeling import HBertForMaskedLM
from hbert_kernels.nn import AdditiveAttention
from hbert_kernels.ops.additive_attention import prefers_key_free

Shape = tuple[int, int, int]


def products(model: HBertForMaskedLM, batch: int, seq: int, masked: int) -> list[Gemm]:
    """Those of forward and backward, equal ones together; `batch` full sequences, the head on `masked` rows.

    Of a linear layer: the output, and the gradients of input and weight. Attention has one product of as many
    operations. The scores and sums of additive attention are not counted: they are bound by memory.
    """
    shapes: Counter[Shape] = Counter()
    for module in model.hbert.layers.modules():
        if isinstance(module, HBertSelfAttention):
            shapes[batch * seq, module.out.in_features, seq * sum(PRODUCTS.values())] += 1
    for linear, rows in _linears(model, batch, seq, masked):
        inner, outer = linear.in_features, linear.out_features
        shapes.update([(rows, inner, outer), (rows, outer, inner), (outer, rows, inner)])
    return [Gemm(*shape, times) for shape, times in shapes.items()]


def _linears(model: HBertForMaskedLM, batch: int, seq: int, masked: int) -> Iterator[tuple[nn.Linear, int]]:
    """The linear layers that are library products, each with the rows that it is applied to."""
    special: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, AdditiveAttention):
            special |= {module.query_att: 0, module.key_att: 0, module.key: _key_rows(module, batch, seq)}
    special |= dict.fromkeys(model.head.modules(), masked)
    for module in model.modules():
        rows = special.get(module, batch * seq)
        if isinstance(module, nn.Linear) and rows:
            yield module, rows


def _key_rows(module: AdditiveAttention, batch: int, seq: int) -> int:
    """Without keys, the key weight meets the vectors of the second scores, and the pooled inputs: a row in all."""
    dense = isinstance(module.key_att, nn.Linear)
    if not prefers_key_free(batch * seq, batch, "dense" if dense else "per_head"):
        return batch * seq
    return batch * ((module.num_heads if dense else 1) + 1)
