"""Memory of this process, from the kernel's own count of resident pages."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from bench import machine

_STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{_STATUS} has no {field}")


def held() -> int:
    """Bytes resident now, when what has been freed is given back.

    Raises:
        RuntimeError: not on Linux.
    """
    if not machine.counts_peak_memory():
        raise RuntimeError("memory is measured on Linux only")
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _resident("VmRSS")


def peak(call: Callable[[], object]) -> int:
    """Bytes resident at the peak of `call`; raises as `held`."""
    held()
    machine.CLEAR_REFS.write_text("5")  # sets the peak back to what is resident now
    call()
    return _resident("VmHWM")
