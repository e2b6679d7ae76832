"""Latency: one forward of the encoder, ids and mask to last hidden state, without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.device import Device
from bench.floor import ProductsFloor
from bench.forward_gate import error, expected, forward, valid_rows
from bench.harness import FLOOR, Case, is_floor
from bench.lengths import spread_lengths
from bench.names import ENCODERS, LOADED, is_packed
from bench.peers import FROZEN, SIZES, batches, build, dtype_name, serving, source, traits
from bench.products import of_forward
from bench.runtime import DTYPES
from bench.task import Task
from hbert.convert import from_pretrained


class Forward(Task):
    """`step` is one forward in `dtype` (weights and activations) of a batch, without padding, padded, or in parts."""

    resident = True

    def __init__(self, peer: str, case: Case, device: Device) -> None:
        self._peer, self._case, self._device = peer, case, device
        self._dtype = dtype_name(peer, case.dtype)
        model = self._source()
        params = case.params
        self._batches = batches(case.batch, case.seq, device, params, model.config.vocab_size, together=is_packed(peer))
        self._model = serving(peer, model, case.dtype, device)
        self.capturable = not params.get("padded", False)  # the models read the mask on the host

    def _source(self) -> torch.nn.Module:
        return build(self._peer, "encoder", self._case.params["size"], self._case.seq)

    def step(self) -> list[Tensor]:
        return forward(self._model, self._batches, self._peer in FROZEN)

    def check(self) -> tuple[float, float]:
        """Error of the last hidden state, padding left out, by the rule of `expected`."""
        source = self._source().eval().to(self._device.place)
        right, allowed = expected(source, self._batches, self._dtype, ours=self._peer in ENCODERS)
        return error(valid_rows(self.step(), self._batches), right, self._dtype), allowed

    def traits(self) -> dict[str, str]:
        return traits(self._peer, DTYPES.get(self._dtype, torch.float32), self._device)

    def peak_memory(self) -> int:
        """Bytes that the process has at the peak of a forward: weights count, and what libraries made of them."""
        return self._device.peak(self.step)


def _floor(peer: str, case: Case, device: Device) -> ProductsFloor:
    model, size = peer.removeprefix(f"{FLOOR}-"), case.params["size"]
    lengths = spread_lengths(case.batch, case.seq) if case.params.get("padded") else [case.seq] * case.batch
    if size in SIZES:
        with torch.device("meta"):
            found = source("hbert-vanilla" if model == "bert" else model, "encoder", size)
    else:
        found = source(LOADED, "encoder", size) if model == LOADED else from_pretrained(size)[0].base_model
    return ProductsFloor(of_forward(found, lengths), case.dtype, device)


def builder(case: Case, device: Device) -> Callable[[str], Task]:
    """What builds each peer's task of `case`."""
    torch.compiler.reset()  # the limit of recompilations counts all shapes of the same code

    def made(peer: str) -> Task:
        return (_floor if is_floor(peer) else Forward)(peer, case, device)

    return made
