"""The equality gate of an encoder's forward: what is right, and how wrong a peer may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.harness import INT8_ERROR, INT8_PEER_ERROR
from bench.peers import Inputs, dense_copy, plain_torch
from bench.runtime import DTYPES, WIDER


def forward(model: Any, batches: Sequence[Inputs], frozen: bool = False) -> list[Tensor]:
    """The last hidden state [B, N, H] of each batch; `frozen` graphs of inductor do not run in inference mode."""
    with torch.no_grad() if frozen else torch.inference_mode():
        return [model(**inputs).last_hidden_state for inputs in batches]


def valid_rows(states: Sequence[Tensor], batches: Sequence[Inputs]) -> Tensor:
    """The rows [tokens, H] that are no padding: what transformers has there differs from model to model."""
    masks = [inputs.get("attention_mask") for inputs in batches]
    return torch.cat(
        [state.flatten(0, 1) if mask is None else state[mask == 1] for state, mask in zip(states, masks, strict=True)]
    )


def expected(source: Any, batches: Sequence[Inputs], dtype: str, ours: bool) -> tuple[Tensor, float]:
    """The right rows, and the largest error allowed, for a model with the weights of `source` in `dtype`.

    fp32 and bf16: rows of the next wider dtype in plain torch; allowed is twice the largest error of plain torch at the
    dtype itself, and 2 ulp of the largest value. int8 is no rounding of the same function: rows of float32, and a
    relative error |out - right| / |right| over all rows of `INT8_ERROR` where the model is `ours`, else of
    `INT8_PEER_ERROR`.
    """
    if dtype == "int8":
        with plain_torch():
            right = valid_rows(forward(dense_copy(source, torch.float32), batches), batches)
        return right, INT8_ERROR if ours else INT8_PEER_ERROR
    own = DTYPES[dtype]
    with plain_torch():
        right = valid_rows(forward(dense_copy(source, WIDER[own]), batches), batches)
        plain = valid_rows(forward(dense_copy(source, own), batches), batches)
    slack = 2 * torch.finfo(own).eps * right.abs().max().item()
    return right, 2 * error(plain, right, dtype) + slack


def error(rows: Tensor, right: Tensor, dtype: str) -> float:
    """Largest absolute error; of int8 the relative one of all rows together."""
    wrong = rows.to(right.dtype) - right
    if dtype == "int8":
        return (wrong.norm() / right.norm()).item()
    return wrong.abs().max().item()
