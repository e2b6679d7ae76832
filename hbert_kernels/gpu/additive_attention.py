"""The core of additive attention on GPUs: a driver over the kernels of additive_pool and gated_layer_norm.

What is left between them is small, one row per sequence and head, and runs as products of torch. Nothing is read
on the host. Shapes: B sequences, h heads, H hidden values, d = H / h; tensors of sequences are float32, and what
enters a product is rounded to the dtype of the activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import alive_rows, cast, rows_of_sequences


class _KeyWeight:
    """The key projection's products with rows of all heads at once, or with each head's own slice."""

    def __init__(self, key_weight: Tensor, x: Tensor, num_heads: int) -> None:
        self.whole = key_weight.to(x.dtype)  # [H, H]
        self.slices = self.whole.unflatten(0, (num_heads, -1))  # [h, d, H]

    def up(self, t: Tensor) -> Tensor:
        """[B, h, d] -> [B, h, H], each head through its slice."""
        return (t.to(self.whole.dtype).transpose(0, 1) @ self.slices).transpose(0, 1).float().contiguous()

    def down(self, t: Tensor) -> Tensor:
        """[B, h, H] -> [B, h, d]."""
        return (t.to(self.whole.dtype).transpose(0, 1) @ self.slices.transpose(1, 2)).transpose(0, 1).float()

    def gradient(self, narrow: Tensor, wide: Tensor) -> Tensor:
        """That of the weight [H, H] through up(narrow) = wide or down(wide) = narrow."""
        by_head = narrow.to(self.whole.dtype).permute(1, 2, 0) @ wide.to(self.whole.dtype).transpose(0, 1)
        return by_head.flatten(0, 1).float()

    def scorers(self, gated: Tensor) -> Tensor:
        """Scorers of x [B, h, H] from those of the key."""
        return (gated.to(self.whole.dtype) @ self.whole).float() if self._dense(gated) else self.up(gated)

    def scorers_backward(self, gated: Tensor, dscorers: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the key's scorers and of the weight."""
        if not self._dense(gated):
            return self.down(dscorers), self.gradient(gated, dscorers)
        rows, drows = (t.to(self.whole.dtype).flatten(0, 1) for t in (gated, dscorers))
        return (drows @ self.whole.t()).float().view_as(gated), (rows.t() @ drows).float()

    def _dense(self, gated: Tensor) -> bool:
        return gated.shape[2] == self.whole.shape[0]


def _beside(global_query: Tensor, key_att: Tensor) -> Tensor:
    """g as a factor of the scorers: [B, 1, H] of dense ones, [B, h, d] of one slice per head."""
    if key_att.shape[1] == global_query.shape[1]:
        return global_query[:, None]
    return global_query.unflatten(1, key_att.shape)


def _project(x: Tensor, key_weight: Tensor | None, key_bias: Tensor | None) -> Tensor:
    if key_weight is None:
        return x
    return F.linear(x, key_weight.to(x.dtype), cast(key_bias, x.dtype))


def _gate_rows(rows: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each row times the gate of its sequence; zeros for dead rows."""
    gated = rows.to(gate.dtype) * rows_of_sequences(gate, cu_seqlens, rows.shape[0])
    return torch.where(alive_rows(rows, cu_seqlens), gated, 0).to(rows.dtype).contiguous()


def _gate_gradient(dout: Tensor, rows: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> Tensor:
    products = dout.to(dtype) * rows.to(dtype)
    return torch.segment_reduce(products, "sum", offsets=cu_seqlens.long(), axis=0, initial=0, unsafe=True)


def additive_attention(
    query: Tensor,
    x: Tensor,
    query_att: Tensor,
    key_att: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    key_free: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    sub_norm: bool,
    eps: float,
    ops: Any = torch.ops.hbert_kernels,
) -> tuple[Tensor, ...]:
    """The op of the same name: its output, and what the backward needs.

    ``ops`` has the kernels: additive_pool, gated_layer_norm and their backward, with their schemas' arguments. All
    results are contiguous, as the schema's are: compiled code relies on that.
    """
    scale = (query.shape[1] // num_heads) ** -0.5
    global_query, query_softmax = ops.additive_pool(query, query_att, cu_seqlens, num_heads, False, scale)
    scorers = (_beside(global_query, key_att) * key_att).contiguous()
    key = nothing = global_query.new_empty(0)
    if key_free and key_weight is not None:
        weight = _KeyWeight(key_weight, x, num_heads)
        scorers = weight.scorers(scorers)
        pooled, softmax = ops.additive_pool(x, scorers, cu_seqlens, num_heads, True, scale)
        key = weight.down(pooled).flatten(1)
        key = key if key_bias is None else key + key_bias.to(key.dtype)
        gate = global_query * key
    else:
        keys = _project(x, key_weight, key_bias)
        pooled, softmax = ops.additive_pool(keys, scorers, cu_seqlens, num_heads, False, scale)
        gate = global_query * pooled
    saved = global_query, query_softmax, scorers, pooled, softmax, key
    if not sub_norm:
        return _gate_rows(query, gate, cu_seqlens), *saved, nothing, torch.empty_like(nothing)
    out, mean, rstd = ops.gated_layer_norm(query, gate, cu_seqlens, norm_weight, norm_bias, eps)
    return out, *saved, mean, rstd


class _KeyGradients(NamedTuple):
    x: Tensor
    scorers: Tensor  # of the key
    weight: Tensor
    bias: Tensor


def _key_free_backward(
    dkey: Tensor, x: Tensor, weight: _KeyWeight, gated: Tensor, pooling: tuple[Any, ...], ops: Any
) -> _KeyGradients:
    scorers, cu_seqlens, pooled, softmax, num_heads, scale = pooling
    narrow = dkey.unflatten(1, (num_heads, -1))
    dx, dscorers = ops.additive_pool_backward(
        weight.up(narrow), x, scorers, cu_seqlens, pooled, softmax, num_heads, True, scale
    )
    dgated, dweight = weight.scorers_backward(gated, dscorers)
    return _KeyGradients(dx, dgated, dweight + weight.gradient(narrow, pooled), dkey.sum(0))


def _direct_backward(
    dkey: Tensor, x: Tensor, key_weight: Tensor | None, key_bias: Tensor | None, pooling: tuple[Any, ...], ops: Any
) -> _KeyGradients:
    scorers, cu_seqlens, pooled, softmax, num_heads, scale = pooling
    keys = _project(x, key_weight, key_bias)
    dkeys, dscorers = ops.additive_pool_backward(
        dkey, keys, scorers, cu_seqlens, pooled, softmax, num_heads, False, scale
    )
    nothing = dkey.new_empty(0)
    if key_weight is None:
        return _KeyGradients(dkeys, dscorers, nothing, nothing)
    # Dead rows of dkeys are zero, but those of x may hold NaN.
    dweight = dkeys.t() @ torch.where(alive_rows(x, cu_seqlens), x, 0)
    return _KeyGradients(dkeys @ key_weight.to(x.dtype), dscorers, dweight, dkeys.sum(0, dtype=dkey.dtype))


def _gradient(like: Tensor, parameter: Tensor | None, gradient: Tensor) -> Tensor:
    return like.new_empty(0) if parameter is None else gradient.to(parameter.dtype)


def additive_attention_backward(
    dout: Tensor,
    query: Tensor,
    x: Tensor,
    query_att: Tensor,
    key_att: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    key_free: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    sub_norm: bool,
    global_query: Tensor,
    query_softmax: Tensor,
    scorers: Tensor,
    pooled: Tensor,
    softmax: Tensor,
    key: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ops: Any = torch.ops.hbert_kernels,
) -> tuple[Tensor, ...]:
    """The op of the same name: gradients of query, x, both scorers, key_weight, key_bias and the norm's two."""
    scale = (query.shape[1] // num_heads) ** -0.5
    key = key if key_free else pooled
    gate = global_query * key
    if sub_norm:
        dquery, dgate, dnorm_weight, dnorm_bias = ops.gated_layer_norm_backward(
            dout, query, gate, cu_seqlens, mean, rstd, norm_weight, norm_bias
        )
    else:
        dquery = _gate_rows(dout, gate, cu_seqlens)
        dgate = _gate_gradient(dout, query, cu_seqlens, gate.dtype)
        dnorm_weight, dnorm_bias = (_zeros_like(query, p) for p in (norm_weight, norm_bias))
    dkey, dglobal = dgate * global_query, dgate * key
    pooling = scorers, cu_seqlens, pooled, softmax, num_heads, scale
    beside = _beside(global_query, key_att)
    if key_free and key_weight is not None:
        weight = _KeyWeight(key_weight, x, num_heads)
        d = _key_free_backward(dkey, x, weight, beside * key_att, pooling, ops)
    else:
        d = _direct_backward(dkey, x, key_weight, key_bias, pooling, ops)
    dkey_att = (d.scorers * beside).sum(0)
    dglobal += (d.scorers * key_att).sum(1) if beside.shape[1] == 1 else (d.scorers * key_att).flatten(1)
    more, dquery_att = ops.additive_pool_backward(
        dglobal, query, query_att, cu_seqlens, global_query, query_softmax, num_heads, False, scale
    )
    return (
        dquery.add_(more), d.x, dquery_att, dkey_att, _gradient(query, key_weight, d.weight),
        _gradient(query, key_bias, d.bias), dnorm_weight, dnorm_bias,
    )  # fmt: skip


def _zeros_like(like: Tensor, parameter: Tensor | None) -> Tensor:
    return like.new_empty(0) if parameter is None else torch.zeros_like(parameter)
