"""Peak of the memory that a call takes beyond what it returns, from the kernel's own count of resident pages."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from bench import machine

_STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{_STATUS} has no {field}")


def peak_extra(call: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes that `call` had resident at its peak, without those of the tensors that it returns.

    Counts every allocator, so also workspaces and packed weights of libraries. What the process has kept from earlier
    calls does not count: ask in a fresh process.

    Raises:
        RuntimeError: not on Linux.
    """
    if not machine.counts_peak_memory():
        raise RuntimeError("peak memory is measured on Linux only")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _resident("VmRSS")
    machine.CLEAR_REFS.write_text("5")  # sets the peak back to what is resident now
    results = list(call())
    return _resident("VmHWM") - before - sum(result.nbytes for result in results)
