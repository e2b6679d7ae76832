"""What the machine can do: a stream of as many bytes read and written, or packed products of the same sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.device import Device
from bench.ops import Gemm
from bench.runtime import torch_traits
from bench.task import Task


def stream(reads: int, writes: int) -> list[tuple[str, int, int]]:
    """Splits bytes read and written over plain kernels: (kernel, bytes read, bytes written).

    `add` reads two streams and writes one, `copy` one and one, `dot` only reads, `fill` only writes.
    """
    add = min(max(reads - writes, 0), writes)
    copy = min(reads, writes - add)
    parts = [
        ("add", 2 * add, add),
        ("copy", copy, copy),
        ("dot", reads - 2 * add - copy, 0),
        ("fill", 0, writes - add - copy),
    ]
    return [part for part in parts if part[1] or part[2]]


class Stream:
    """One call moves the bytes; each has buffers of its own, so `Stream`s in turn are as cold as the ops in turn."""

    name = "stream"

    def __init__(self, reads: int, writes: int, device: Device) -> None:
        self._place = device.place
        self._parts = [(kernel, self._buffers(kernel, *moved)) for kernel, *moved in stream(reads, writes)]

    def _buffers(self, kernel: str, read: int, written: int) -> list[Tensor]:
        sources = {"add": 2, "dot": 2, "copy": 1, "fill": 0}[kernel]
        sizes = [read // sources // 4 for _ in range(sources)] + ([written // 4] if written else [])
        return [torch.ones(size, device=self._place) for size in sizes]

    def __call__(self) -> None:
        for kernel, buffers in self._parts:
            if kernel == "add":
                torch.add(buffers[0], buffers[1], out=buffers[2])
            elif kernel == "copy":
                buffers[1].copy_(buffers[0])
            elif kernel == "dot":
                torch.dot(buffers[0], buffers[1])
            else:
                buffers[0].fill_(1.0)


def product_dtype(dtype: torch.dtype, device: Device) -> torch.dtype:
    """`dtype`, or float32 on a CPU where oneDNN has no bfloat16 product: there that is the faster of the two."""
    if dtype == torch.bfloat16 and _has_onednn(device) and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return dtype


def _has_onednn(device: Device) -> bool:
    return device.place.type == "cpu" and torch.backends.mkldnn.is_available()


class Product:
    """One call is the product; oneDNN's with the weight packed beforehand, torch's linear where torch lacks that."""

    def __init__(self, gemm: Gemm, dtype: torch.dtype, device: Device) -> None:
        dtype = product_dtype(dtype, device)
        self._times = gemm.times
        self._rows, weight = (
            torch.randn(count, gemm.k, device=device.place).to(dtype) for count in (gemm.m, gemm.n)
        )
        packed = _has_onednn(device) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        self._packed, self.name = packed, "packed product" if packed else "product"
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, gemm.m) if packed else weight

    def __call__(self) -> None:
        for _ in range(self._times):
            if self._packed:
                torch.ops.mkldnn._linear_pointwise(self._rows, self._weight, None, "none", [], "")
            else:
                torch.nn.functional.linear(self._rows, self._weight)


class StepFloor(Task):
    """One call is all `gemms`, one after the other: a step of which nothing is left but its products."""

    capturable = True

    def __init__(self, gemms: Sequence[Gemm], dtype: torch.dtype, device: Device) -> None:
        self._products = [Product(gemm, dtype, device) for gemm in gemms]
        self._gflop = sum(gemm.flops for gemm in gemms) * 1e-9
        self._device = device

    def step(self) -> None:
        for product in self._products:
            product()

    def check(self) -> tuple[float, float]:
        """Nothing to compare."""
        return 0.0, 0.0

    def traits(self) -> dict[str, str]:
        backend = f"{self._products[0].name}s, {self._gflop:.4g} GFLOP"
        return {**torch_traits(self._device), "backend": backend}
