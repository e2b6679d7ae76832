"""What the machine can do: a stream of as many bytes read and written, or packed products of the same sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.device import Device
from bench.ops import Gemm
from bench.runtime import DTYPES, torch_traits
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
        self._rows, weight = (torch.randn(count, gemm.k, device=device.place).to(dtype) for count in (gemm.m, gemm.n))
        packed = _has_onednn(device) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        self._packed, self.name = packed, "packed product" if packed else "product"
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, gemm.m) if packed else weight

    def __call__(self) -> None:
        for _ in range(self._times):
            if self._packed:
                torch.ops.mkldnn._linear_pointwise(self._rows, self._weight, None, "none", [], "")
            else:
                torch.nn.functional.linear(self._rows, self._weight)


class Int8Product:
    """One call is oneDNN's product of uint8 rows and packed int8 weights, a scale for each channel, float32 results.

    Raises:
        RuntimeError: not on a CPU, or this torch is without oneDNN.
    """

    name = "packed int8 product"

    def __init__(self, gemm: Gemm, device: Device) -> None:
        if not _has_onednn(device):
            raise RuntimeError("a packed int8 product is had of oneDNN on a CPU only")
        self._times = gemm.times
        self._rows = torch.randint(0, 256, (gemm.m, gemm.k), dtype=torch.uint8)
        weight = torch.randint(-127, 128, (gemm.n, gemm.k), dtype=torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(weight, [gemm.m, gemm.k])
        self._scales, self._zeros = torch.ones(gemm.n), torch.zeros(gemm.n, dtype=torch.int32)

    def __call__(self) -> None:
        for _ in range(self._times):
            torch.ops.onednn.qlinear_pointwise(
                self._rows, 1.0, 0, self._weight, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )


class ProductsFloor(Task):
    """One call is all `gemms`, one after the other: a forward or a step of which only its products are left."""

    capturable = True

    def __init__(self, gemms: Sequence[Gemm], dtype: str, device: Device) -> None:
        made = Int8Product if dtype == "int8" else partial(Product, dtype=DTYPES[dtype])
        self._products = [made(gemm, device=device) for gemm in gemms]
        self._gflop = sum(gemm.flops for gemm in gemms) * 1e-9
        self._device = device

    def step(self) -> None:
        for product in self._products:
            product()

    def check(self) -> tuple[float, float]:
        """Nothing to compare."""
        return 0.0, 0.0

    def traits(self) -> dict[str, str]:
        """`gflop`: the operations of a call, of which its rate is made."""
        gflop = f"{self._gflop:.4g}"
        backend = f"{self._products[0].name}s, {gflop} GFLOP"
        return {**torch_traits(self._device), "backend": backend, "gflop": gflop}
