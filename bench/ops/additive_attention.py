"""additive_attention with sub-layer norm, in both forms, and its core alone, against the plain torch composition.

`core-*` starts from the query and the key; the others from the query and the layer input, with the key projection
inside (or, K-free, without it): there `hbert-direct` is K GEMM + core.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from bench.ops import HEADS, HIDDEN, TOKENS, Cost, Op, Setting, tensors
from bench.ops.additive_pool import HEAD_DIM, SCORER_WIDTH, pool, pool_operations
from bench.ops.gated_layer_norm import OPERATIONS as NORM_OPERATIONS
from bench.ops.problem import Draw, Function, Problem, uniform_cu_seqlens
from hbert_kernels import additive_attention

_EPS = 1e-12  # the gated query is small: its norm must not drown in epsilon
_FORMS = {"hbert-direct": "direct", "hbert-key-free": "key_free"}


def _cost(setting: Setting) -> Cost:
    """Each sequence's rows are read once: they stay in the core's cache from the first pooling to the gate.

    The core has the operations of two poolings and the gated norm; with a key weight they depend on the form.
    """
    backward = setting.step == "bwd"
    width = SCORER_WIDTH[setting.variant.removeprefix("core-")]
    operations = 2 * pool_operations(setting.step, width) + NORM_OPERATIONS[setting.step]
    core = tensors(setting, HIDDEN, *((3, 2) if backward else (2, 1)), operations)
    if setting.variant.startswith("core"):
        return core
    key_weight = HIDDEN * HIDDEN * setting.itemsize
    return Cost(core.reads + key_weight, core.writes + (key_weight if backward else 0), None)


def _eager_core(setting: Setting) -> Callable[..., Tensor]:
    def core(query: Tensor, key: Tensor, query_att: Tensor, key_att: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        query, key = (rows.view(setting.batch, setting.seq, HIDDEN) for rows in (query, key))
        product = pool(query, query_att)[:, None] * key
        gated = query * pool(product, key_att)[:, None]
        return F.layer_norm(gated, (HIDDEN,), weight, bias, _EPS).flatten(0, 1)

    return core


def _core(setting: Setting) -> Function:
    cu_seqlens = uniform_cu_seqlens(setting)

    def core(query: Tensor, key: Tensor, query_att: Tensor, key_att: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return additive_attention(
            query,
            key,
            query_att,
            None,
            None,
            key_att,
            cu_seqlens,
            setting.seq,
            HEADS,
            norm_weight=weight,
            norm_bias=bias,
            sub_norm=True,
            eps=_EPS,
        )

    return core


def _form(setting: Setting, form: str) -> Function:
    cu_seqlens = uniform_cu_seqlens(setting)

    def op(
        query: Tensor,
        x: Tensor,
        query_att: Tensor,
        key_att: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        key_weight: Tensor,
        key_bias: Tensor,
    ) -> Tensor:
        return additive_attention(
            query,
            x,
            query_att,
            key_weight,
            key_bias,
            key_att,
            cu_seqlens,
            setting.seq,
            HEADS,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            sub_norm=True,
            eps=_EPS,
            form=form,
        )

    return op


def _eager(setting: Setting) -> Function:
    core = _eager_core(setting)

    def op(
        query: Tensor,
        x: Tensor,
        query_att: Tensor,
        key_att: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        key_weight: Tensor,
        key_bias: Tensor,
    ) -> Tensor:
        return core(query, F.linear(x, key_weight, key_bias), query_att, key_att, norm_weight, norm_bias)

    return op


def _problem(setting: Setting) -> Problem:
    draw = Draw(setting)
    width = SCORER_WIDTH[setting.variant.removeprefix("core-")]
    scorers = [draw.normal(HEADS, width, scale=(HEAD_DIM / width) ** 0.5) for _ in range(2)]
    activations, parameters = (draw.rows(), draw.rows()), (*scorers, *draw.affine())
    if setting.variant.startswith("core"):
        return Problem(activations, parameters, {"hbert": _core(setting)}, {"eager": _eager_core(setting)})
    key = draw.normal(HIDDEN, HIDDEN, scale=HIDDEN**-0.5), draw.normal(HIDDEN)
    forms = {name: _form(setting, form) for name, form in _FORMS.items()}
    return Problem(activations, (*parameters, *key), forms, {"eager": _eager(setting)})


OP = Op(
    "additive_attention",
    _cost,
    _problem,
    variants=dict.fromkeys([*(f"core-{scorer}" for scorer in SCORER_WIDTH), *SCORER_WIDTH], TOKENS),
    candidates=lambda variant: ("hbert",) if variant.startswith("core") else tuple(_FORMS),
    memory=("dense",),
)
