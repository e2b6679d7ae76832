"""Additive attention (Fastformer): the core between the query projection and the transform, direct and K-free."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from ._common import (
    alive_rows,
    cast,
    compute_dtype,
    gradient_like,
    new_statistics,
    present,
    rows_of_sequences,
    run,
    without_autocast,
)
from .additive_pool import additive_pool
from .gated_layer_norm import gated_layer_norm

FORMS = ("auto", "direct", "key_free")
# Below these mean sequence lengths the K-free form's work for each sequence (products of h rows, or of one, with the
# key weight) costs more than the key projection that it saves: measured, docs/kernels.md.
_KEY_FREE_FROM_LENGTH = {"dense": 24, "per_head": 8}


def prefers_key_free(num_tokens: int, num_seqs: int, scorer: str = "dense") -> bool:
    """Whether the K-free form is the cheaper one: a rule of shapes alone, so that it is fixed for a compiled graph."""
    return num_tokens >= _KEY_FREE_FROM_LENGTH[scorer] * num_seqs


def additive_attention(
    query: Tensor,
    x: Tensor,
    query_att: Tensor,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    key_att: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    *,
    query_att_bias: Tensor | None = None,
    key_att_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    sub_norm: bool = False,
    eps: float = 1e-12,
    form: str = "auto",
) -> Tensor:
    r"""The core of additive attention for packed sequences (Wu et al. 2021, arXiv 2108.09084, eq. 3-8).

    With Q = ``query`` (already projected; the value shares it), K = x Wk + bk, d = H/h, per sequence (Wk is
    ``key_weight`` transposed, as in torch.nn.Linear):

    .. math::
        g_j = \sum_t \mathrm{softmax}_t(Q w^a_j/\sqrt d)_t\, Q_{t,j}, \quad
        P = K \circ g, \quad
        k_j = \sum_t \mathrm{softmax}_t(P w^b_j/\sqrt d)_t\, P_{t,j}, \quad
        U = Q \circ k

    **K-free form** (exact): with A_j = Wk (g o w^b_j) the logits of the second softmax are x A_j/sqrt(d) up to what
    is constant over t, and with the pooled xbar_j = sum_t beta_tj x_t, k_j = g_j o (xbar_j Wk[:, j] + bk_j): K is never
    formed. The scorers' biases are constant over t too: they change nothing, and their gradient is exactly zero.

    Args:
        query: [T, H], float32, bfloat16 or float64 (float16 on GPUs).
        x: [T, H], the layer input that the query was projected from.
        query_att, key_att: scorers, both [h, H] (dense: every head scores the whole row) or both [h, d] (per head).
        key_weight, key_bias: [H, H] and [H] or None, as in torch.nn.Linear. No key_weight: x is the key itself.
        cu_seqlens: int32 [B+1], the first row of each sequence.
        max_seqlen: an upper bound of the sequence lengths.
        num_heads: h; must divide H.
        query_att_bias, key_att_bias: [h] or None.
        norm_weight, norm_bias, eps: affine parameters [H] or None and epsilon of the sub-layer norm; unused without.
        sub_norm: return LN(U) instead of U.
        form: "direct", "key_free" (needs key_weight) or "auto" (the cheaper one by :func:`prefers_key_free`; while
            exporting, direct); they agree to rounding. Neither keeps a key for the backward: the direct form projects
            it once more.

    Returns:
        U or LN(U), [T, H] in query's dtype; rows behind cu_seqlens[-1] are zero.

    Raises:
        TypeError: unsupported dtype, or cu_seqlens is not int32.
        ValueError: a shape, device or option does not fit, or cu_seqlens is not increasing or out of range.
    """
    op = "additive_attention"
    _check.packed(op, "query", query)
    hidden = query.shape[1]
    head_dim = _check.heads(op, hidden, num_heads)
    _check.floating(
        op, query=query, x=x, query_att=query_att, key_weight=key_weight, key_bias=key_bias, key_att=key_att,
        query_att_bias=query_att_bias, key_att_bias=key_att_bias, norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    _check.shape(op, "x", x, *query.shape)
    _check.shape(op, "key_weight", key_weight, hidden, hidden)
    if tuple(query_att.shape) not in [(num_heads, hidden), (num_heads, head_dim)]:
        allowed = f"({num_heads}, {hidden}) (dense) or ({num_heads}, {head_dim}) (per head)"
        raise ValueError(f"{op}: query_att has shape {tuple(query_att.shape)}, allowed: {allowed}")
    _check.shape(op, "key_att", key_att, *query_att.shape)
    for name, bias in (("query_att_bias", query_att_bias), ("key_att_bias", key_att_bias)):
        _check.shape(op, name, bias, num_heads)
    for name, parameter in (("key_bias", key_bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _check.shape(op, name, parameter, hidden)
    _check.cu_seqlens(op, cu_seqlens, query.shape[0], query.device, max_seqlen)
    if form not in FORMS:
        raise ValueError(f"{op}: form is {form!r}, allowed: {', '.join(map(repr, FORMS))}")
    if key_weight is None and (form == "key_free" or key_bias is not None):
        raise ValueError(f"{op}: without key_weight, x is the key itself: no key_free form, and no key_bias")
    if form == "auto":
        # A choice by the lengths would be a guard on them, and what is exported is for all that were declared.
        may_choose = key_weight is not None and not torch.compiler.is_exporting()
        scorer = "dense" if key_att.shape[1] == hidden else "per_head"
        key_free = may_choose and prefers_key_free(query.shape[0], cu_seqlens.shape[0] - 1, scorer)
        form = "key_free" if key_free else "direct"
    compute = compute_dtype(query)
    query_att = _with_idle_bias(query_att.to(compute), query_att_bias)
    key_att = _with_idle_bias(key_att.to(compute), key_att_bias)
    norm = (norm_weight, norm_bias) if sub_norm else (None, None)
    arguments = (
        query, x.to(query.dtype), query_att, key_att, cu_seqlens, num_heads, key_weight, key_bias, form == "key_free",
        *norm, sub_norm, eps,
    )  # fmt: skip
    if _dispatch.select(op, query, x, query_att) == "reference":
        return additive_attention_reference(*arguments, max_seqlen)
    return run(_AdditiveAttention, _forward, *arguments)


def _with_idle_bias(scorer: Tensor, bias: Tensor | None) -> Tensor:
    """The scorer, with a bias that is constant over t: no effect, and a zero gradient (not None: DDP waits for it)."""
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return scorer
    return scorer + 0.0 * bias.to(scorer.dtype).sum()


@without_autocast
def additive_attention_reference(
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
    max_seqlen: int,
) -> Tensor:
    """The composition of additive_pool, plain torch and gated_layer_norm; any device, differentiable, exportable."""
    varlen = (cu_seqlens, max_seqlen, num_heads)
    global_query = additive_pool(query, query_att, *varlen)
    # Dead rows get no gradient, but 0 * NaN would still reach that of the weight.
    alive = alive_rows(x, cu_seqlens)
    if key_free and key_weight is not None:
        gate = _key_free_global_key(global_query, x, key_weight, key_bias, key_att, varlen)
    else:
        key = x
        if key_weight is not None:
            key = F.linear(torch.where(alive, x, 0), key_weight.to(x.dtype), cast(key_bias, x.dtype))
        product = key.to(global_query.dtype) * rows_of_sequences(global_query, cu_seqlens, x.shape[0])
        gate = additive_pool(product, key_att.to(product.dtype), *varlen)
    if sub_norm:
        return gated_layer_norm(query, gate, cu_seqlens, norm_weight, norm_bias, eps)
    gated = query.to(gate.dtype) * rows_of_sequences(gate, cu_seqlens, query.shape[0])
    return torch.where(alive, gated, 0).to(query.dtype)


def _key_free_global_key(
    global_query: Tensor,
    x: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    key_att: Tensor,
    varlen: tuple[Tensor, int, int],
) -> Tensor:
    # As everywhere, GEMMs run in the dtype of the activations, softmax and statistics in the compute dtype.
    num_heads, weight = varlen[2], key_weight.to(x.dtype)
    weight_heads = weight.unflatten(0, (num_heads, -1))
    if key_att.shape[1] == x.shape[1]:
        scored = global_query[:, None, :] * key_att.to(global_query.dtype)
        scorer = scored.to(x.dtype) @ weight
    else:
        scored = global_query.unflatten(1, (num_heads, -1)) * key_att.to(global_query.dtype)
        scorer = torch.einsum("bhd,hdi->bhi", scored.to(x.dtype), weight_heads)
    pooled = additive_pool(x, scorer, *varlen, output="full").to(x.dtype)
    key = torch.einsum("bhi,hdi->bhd", pooled, weight_heads).flatten(1).to(global_query.dtype)
    return global_query * (key if key_bias is None else key + key_bias.to(key.dtype))


def _forward_fake(
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
) -> tuple[Tensor, ...]:
    num_seqs, hidden = cu_seqlens.shape[0] - 1, query.shape[1]
    per_sequence, softmax = query_att.new_empty(num_seqs, hidden), query_att.new_empty(num_seqs, 2, num_heads)
    per_head = (num_seqs, num_heads, hidden)
    scorers = query_att.new_empty(per_head if key_free else (num_seqs, *key_att.shape))
    pooled = query_att.new_empty(per_head) if key_free else torch.empty_like(per_sequence)
    key = torch.empty_like(per_sequence) if key_free else query_att.new_empty(0)
    statistics = new_statistics(query) if sub_norm else (query_att.new_empty(0), query_att.new_empty(0))
    out, softmaxes = query.new_empty(query.shape), (softmax, torch.empty_like(softmax))
    return out, per_sequence, softmaxes[0], scorers, pooled, softmaxes[1], key, *statistics


def _backward_fake(
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
    *_: Any,
) -> tuple[Tensor, ...]:
    inputs = query, x, query_att, key_att
    parameters = key_weight, key_bias, norm_weight, norm_bias
    return *(t.new_empty(t.shape) for t in inputs), *(gradient_like(query, p) for p in parameters)


_ARGUMENTS = (
    "Tensor query, Tensor x, Tensor query_att, Tensor key_att, Tensor cu_seqlens, int num_heads, Tensor? key_weight,"
    " Tensor? key_bias, bool key_free, Tensor? norm_weight, Tensor? norm_bias, bool sub_norm"
)
_SAVED = (
    "Tensor global_query, Tensor query_softmax, Tensor scorers, Tensor pooled, Tensor softmax, Tensor key, Tensor mean,"
    " Tensor rstd"
)
_library.define(f"additive_attention({_ARGUMENTS}, float eps) -> (Tensor out, {_SAVED})", _forward_fake)
_library.define(
    f"additive_attention_backward(Tensor dout, {_ARGUMENTS}, {_SAVED}) -> (Tensor dquery, Tensor dx, Tensor dquery_att,"
    " Tensor dkey_att, Tensor dkey_weight, Tensor dkey_bias, Tensor dnorm_weight, Tensor dnorm_bias)",
    _backward_fake,
)


# The op's own products must not be cast by autocast.
@without_autocast
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.hbert_kernels.additive_attention(*arguments)


@without_autocast
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.hbert_kernels.additive_attention_backward(*arguments)


class _AdditiveAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, *saved = _forward(*arguments)
        *inputs, num_heads, key_weight, key_bias, key_free, norm_weight, norm_bias, sub_norm, _ = arguments
        ctx.save_for_backward(*inputs, key_weight, key_bias, norm_weight, norm_bias, *saved)
        ctx.options = num_heads, key_free, sub_norm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, key_weight, key_bias, norm_weight, norm_bias = (saved := ctx.saved_tensors)[:9]
        num_heads, key_free, sub_norm = ctx.options
        dquery, dx, dquery_att, dkey_att, dweight, dbias, dnorm_weight, dnorm_bias = _backward(
            dout, *inputs, num_heads, key_weight, key_bias, key_free, norm_weight, norm_bias, sub_norm, *saved[9:]
        )
        key_gradients = present(key_weight, dweight), present(key_bias, dbias)
        norm_gradients = present(norm_weight, dnorm_weight), present(norm_bias, dnorm_bias)
        return dquery, dx, dquery_att, dkey_att, None, None, *key_gradients, None, *norm_gradients, None, None


def _cpp_refusal(
    query: Tensor | None = None, x: Tensor | None = None, query_att: Tensor | None = None, *others: Tensor | None
) -> str | None:
    return _dispatch.refusal("additive_pool", "cpp", query, query_att)


_dispatch.register("additive_attention", "cpp", _cpp_refusal)
