"""The matrix products that one call of our models cannot do without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from bench.ops import Gemm
from bench.ops.attention import PRODUCTS
from hbert.layers import HBertSelfAttention
from hbert.modeling import HBertForMaskedLM, HBertModel
from hbert_kernels.nn import AdditiveAttention
from hbert_kernels.ops.additive_attention import prefers_key_free

Shape = tuple[int, int, int]


def of_forward(model: HBertModel, lengths: Sequence[int]) -> list[Gemm]:
    """Those of an encoder's forward on packed sequences of `lengths`, equal ones together.

    Of a linear layer: the output. Attention has products of as many operations. The scores and sums of additive
    attention are not counted: they are bound by memory.
    """
    shapes = _attentions(model, lengths, PRODUCTS["fwd"])
    for linear, rows in _linears(model, lengths):
        shapes[rows, linear.in_features, linear.out_features] += 1
    return [Gemm(*shape, times) for shape, times in shapes.items()]


def of_training_step(model: HBertForMaskedLM, batch: int, seq: int, masked: int) -> list[Gemm]:
    """Those of forward and backward of a masked language model; `batch` full sequences, the head on `masked` rows.

    As `of_forward`; of a linear layer also the gradients of input and weight.
    """
    lengths = [seq] * batch
    shapes = _attentions(model, lengths, sum(PRODUCTS.values()))
    head = dict.fromkeys(model.head.modules(), masked)
    for linear, rows in _linears(model, lengths, head):
        inner, outer = linear.in_features, linear.out_features
        shapes.update([(rows, inner, outer), (rows, outer, inner), (outer, rows, inner)])
    return [Gemm(*shape, times) for shape, times in shapes.items()]


def _attentions(model: nn.Module, lengths: Sequence[int], products: int) -> Counter[Shape]:
    """For each self-attention one product with a row for each token and as many operations as its `products` have."""
    tokens = sum(lengths)
    columns = round(products * sum(n * n for n in lengths) / tokens)
    modules = (module for module in model.modules() if isinstance(module, HBertSelfAttention))
    return Counter((tokens, module.out.in_features, columns) for module in modules)


def _linears(
    model: nn.Module, lengths: Sequence[int], special: dict[nn.Module, int] | None = None
) -> Iterator[tuple[nn.Linear, int]]:
    """The linear layers that are library products, each with the rows that it is applied to; `special`: others."""
    rows_of = dict(special or {})
    for module in model.modules():
        if isinstance(module, AdditiveAttention):
            rows_of |= {module.query_att: 0, module.key_att: 0, module.key: _key_rows(module, lengths)}
    for module in model.modules():
        rows = rows_of.get(module, sum(lengths))
        if isinstance(module, nn.Linear) and rows:
            yield module, rows


def _key_rows(module: AdditiveAttention, lengths: Sequence[int]) -> int:
    """Without keys, the key weight meets the vectors of the second scores, and the pooled inputs: a row in all."""
    dense = isinstance(module.key_att, nn.Linear)
    if not prefers_key_free(sum(lengths), len(lengths), "dense" if dense else "per_head"):
        return sum(lengths)
    return len(lengths) * ((module.num_heads if dense else 1) + 1)
