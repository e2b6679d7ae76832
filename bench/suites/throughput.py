"""Throughput: steps of masked-language-model training (forward, backward, fused AdamW) on batches of the corpus."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from bench.device import Device, peak_extra
from bench.floor import ProductsFloor
from bench.harness import Case, is_floor
from bench.peers import build, compiled, dense_copy, dtype_name, plain_torch, traits
from bench.products import of_training_step
from bench.runtime import DTYPES, WIDER
from bench.suites.training_suite import model_of
from bench.task import Task

LEARNING_RATE = 1e-5


class TrainingStep(Task):
    """`step` trains on the next batch; bf16 is autocast over fp32 weights, fp32 is fp32 throughout."""

    def __init__(self, peer: str, case: Case, device: Device) -> None:
        self._peer, self._dtype, self._device = peer, DTYPES[dtype_name(peer, case.dtype)], device
        self._model = build(peer, "masked_lm", case.params["size"]).to(device.place).train()
        self._call = compiled(peer, self._model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE, fused=True)
        self._batches = _load(case.params["batches"], device)
        self._upcoming = cycle(self._batches)

    def _backward(self, model: torch.nn.Module, batch: dict[str, Tensor], autocast: bool) -> None:
        with torch.autocast(self._device.name, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()

    def step(self) -> None:
        self._backward(self._call, next(self._upcoming), self._dtype is torch.bfloat16)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def check(self) -> tuple[float, float]:
        """Relative error |g - ref| / |ref| of all gradients as one vector; allowed: twice plain torch's.

        And 2 ulp of the gradients' own dtype, fp32: over so many elements plain torch's error is no accident.
        """
        half, batch = self._dtype is torch.bfloat16, self._batches[0]
        reference, plain = (dense_copy(self._model, dtype) for dtype in (WIDER[self._dtype], torch.float32))
        with plain_torch():
            self._backward(reference, batch, autocast=False)
            self._backward(plain, batch, autocast=half)
        allowed = 2 * _gradient_error(plain, reference) + 2 * torch.finfo(torch.float32).eps
        self._backward(self._call, batch, autocast=half)
        error = _gradient_error(self._model, reference)
        self._optimizer.zero_grad(set_to_none=True)
        return error, allowed

    def traits(self) -> dict[str, str]:
        return traits(self._peer, self._dtype, self._device)

    def peak_memory(self) -> int:
        """Bytes of a step beyond weights and optimizer state, in a process that has made steps before."""

        def once() -> tuple[()]:
            self.step()
            return ()

        return peak_extra(self._device, once)


def _load(path: str, device: Device) -> list[dict[str, Tensor]]:
    with np.load(path) as stored:
        ids, labels = (torch.from_numpy(stored[name].astype(np.int64)) for name in ("input_ids", "labels"))
    ids, labels = ids.to(device.place), labels.to(device.place)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": target}
        for i, target in zip(ids, labels, strict=True)
    ]


def _gradient_error(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    wrong = total = 0.0
    for mine, right in zip(model.parameters(), reference.parameters(), strict=True):
        if right.grad is None and mine.grad is None:
            continue
        if right.grad is None or mine.grad is None:
            return float("inf")
        wrong += (mine.grad.to(right.grad.dtype) - right.grad).square().sum().item()
        total += right.grad.square().sum().item()
    return (wrong / total) ** 0.5


def _floor(peer: str, case: Case, device: Device) -> ProductsFloor:
    with torch.device("meta"):
        model = build(model_of(peer), "masked_lm", case.params["size"])
    with np.load(case.params["batches"]) as stored:
        masked = round((stored["labels"] >= 0).sum() / len(stored["labels"]))
    return ProductsFloor(of_training_step(model, case.batch, case.seq, masked), case.dtype, device)


def builder(case: Case, device: Device) -> Callable[[str], Task]:
    """What builds each peer's task of `case`."""
    torch.compiler.reset()  # the limit of recompilations counts all shapes of the same code

    def made(peer: str) -> Task:
        return (_floor if is_floor(peer) else TrainingStep)(peer, case, device)

    return made
