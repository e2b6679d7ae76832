"""Process-wide memory policy."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MMAP_THRESHOLDS = 1 << 30, 32 << 20  # the second is the most that an older glibc takes


def keep_heap() -> bool:
    """Make glibc keep freed memory instead of giving it back to the system, and say whether that was possible.

    Large activations are otherwise mapped anew at every step, and the page faults of fresh pages cost more than the row
    kernels that fill them. The price is a resident size that does not shrink. Call it once, at the start of a
    program; the hbert commands and bench/run.py do, an import never does.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Any of these settings stops glibc from adapting the mmap threshold: without a large one every big block would be
    # mapped anew.
    if not any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in _MMAP_THRESHOLDS):
        return False
    return all([mallopt(_M_TRIM_THRESHOLD, 2000 << 20) == 1, mallopt(_M_TOP_PAD, 64 << 20) == 1])
