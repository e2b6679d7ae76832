"""Latency: one forward of the encoder, ids and mask to last hidden state, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.device import Device
from bench.harness import Case
from bench.peers import build, compiled, dense_copy, dtype_of, ids_and_mask, plain_torch, traits
from bench.runtime import WIDER
from bench.task import Task


class Forward(Task):
    """`step` is one forward in `dtype` (weights and activations) of `batch` sequences, without padding or `padded`."""

    def __init__(self, peer: str, case: Case, device: Device) -> None:
        self._peer, self._dtype, self._device = peer, dtype_of(peer, case.dtype), device
        self._model = build(peer, "encoder", case.params["size"]).to(device.place, self._dtype).eval()
        self._call = compiled(peer, self._model)
        padded = case.params.get("padded", False)
        self._inputs = ids_and_mask(case.batch, case.seq, device, padded)
        self.capturable = not padded  # the models read the mask on the host

    def _forward(self, model: torch.nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(**self._inputs).last_hidden_state

    def step(self) -> Tensor:
        return self._forward(self._call)

    def check(self) -> tuple[float, float]:
        """Largest error of the last hidden state, padding left out.

        Allowed: twice plain torch's, and 2 ulp of the largest value.
        """
        with plain_torch():
            reference = self._valid(self._forward(dense_copy(self._model, WIDER[self._dtype])))
            plain = self._valid(self._forward(dense_copy(self._model, self._dtype)))
        slack = 2 * torch.finfo(self._dtype).eps * reference.abs().max().item()
        return _largest_error(self._valid(self.step()), reference), 2 * _largest_error(plain, reference) + slack

    def _valid(self, output: Tensor) -> Tensor:
        """The rows [tokens, H] that are no padding: what transformers has there differs from model to model."""
        mask = self._inputs.get("attention_mask")
        return output.flatten(0, 1) if mask is None else output[mask == 1]

    def traits(self) -> dict[str, str]:
        return traits(self._peer, self._dtype, self._device)


def _largest_error(output: Tensor, reference: Tensor) -> float:
    return (output.to(reference.dtype) - reference).abs().max().item()


def builder(case: Case, device: Device) -> Callable[[str], Forward]:
    """What builds each peer's task of `case`."""
    return partial(Forward, case=case, device=device)
