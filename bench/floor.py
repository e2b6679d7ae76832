"""The floors of the kernels suite: a stream of as many bytes read and written, or a packed product of the same size."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.ops import Gemm


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

    def __init__(self, reads: int, writes: int) -> None:
        self._parts = [(kernel, self._buffers(kernel, *moved)) for kernel, *moved in stream(reads, writes)]

    @staticmethod
    def _buffers(kernel: str, read: int, written: int) -> list[Tensor]:
        sources = {"add": 2, "dot": 2, "copy": 1, "fill": 0}[kernel]
        made = [torch.ones(read // sources // 4) for _ in range(sources)]
        return made + [torch.ones(written // 4)] if written else made

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


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where oneDNN has no bfloat16 product: there that is the faster of the two."""
    has_onednn = torch.backends.mkldnn.is_available()
    if dtype == torch.bfloat16 and has_onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return dtype


class Product:
    """One call is the product; oneDNN's with the weight packed beforehand, torch's linear where torch lacks that."""

    def __init__(self, gemm: Gemm, dtype: torch.dtype) -> None:
        dtype = product_dtype(dtype)
        self._times = gemm.times
        self._rows = torch.randn(gemm.m, gemm.k).to(dtype)
        weight = torch.randn(gemm.n, gemm.k).to(dtype)
        packed = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        self._packed, self.name = packed, "packed product" if packed else "product"
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, gemm.m) if packed else weight

    def __call__(self) -> None:
        for _ in range(self._times):
            if self._packed:
                torch.ops.mkldnn._linear_pointwise(self._rows, self._weight, None, "none", [], "")
            else:
                torch.nn.functional.linear(self._rows, self._weight)
