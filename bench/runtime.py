"""What every worker needs of torch: dtypes, threads, the heap policy, and the name of the backend that ran."""

from __future__ import annotations

import torch

import hbert_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
SEED = 0
HEAP_KEPT = "kept (hbert_kernels.keep_heap in every worker)"
HEAP_DEFAULT = "the C library's default in every worker"


def settle(threads: int) -> str:
    """Sets this process's threads, runs all of them once, and applies the heap policy, which it returns."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.zeros(threads << 20).add_(1)
    return HEAP_KEPT if hbert_kernels.keep_heap() else HEAP_DEFAULT


def torch_traits() -> dict[str, str]:
    """`isa` and `backend` of what is torch's own."""
    return {"isa": torch.backends.cpu.get_cpu_capability().lower(), "backend": "torch"}


def hbert_traits(backend: str) -> dict[str, str]:
    """`isa` and `backend` of what runs on hbert_kernels."""
    return {"isa": hbert_kernels.cpu_capability(), "backend": backend}


def chosen_backend(explanation: str) -> str:
    """The backend named by the first line of hbert_kernels.explain, "op: backend runs"."""
    return explanation.splitlines()[0].partition(": ")[2].split()[0]
