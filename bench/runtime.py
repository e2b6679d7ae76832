"""What every worker needs of torch: dtypes, threads, the heap policy, and the name of the backend that ran."""

from __future__ import annotations

import torch

import hbert_kernels
from bench.device import Device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
SEED = 0


def settle(threads: int, keep_heap: bool) -> bool:
    """Sets this process's threads and runs all of them once; whether its C library keeps freed memory."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.zeros(threads << 20).add_(1)
    return keep_heap and hbert_kernels.keep_heap()


def torch_traits(device: Device) -> dict[str, str]:
    """`isa` and `backend` of what is torch's own."""
    return {"isa": device.isa or torch.backends.cpu.get_cpu_capability().lower(), "backend": "torch"}


def hbert_traits(device: Device, backend: str) -> dict[str, str]:
    """`isa` and `backend` of what runs on hbert_kernels."""
    return {"isa": device.isa or hbert_kernels.cpu_capability(), "backend": backend}


def chosen_backend(explanation: str) -> str:
    """The backend named by the first line of hbert_kernels.explain, "op: backend runs"."""
    return explanation.splitlines()[0].partition(": ")[2].split()[0]
