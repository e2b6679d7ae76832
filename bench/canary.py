"""A fixed computation, timed in every round: it tells of load and of clocks that the run queues do not show."""

from __future__ import annotations

import hashlib
import time

_BYTES = bytes(1 << 20)
_TIMES = 3


def sing() -> float:
    """Seconds that a SHA-256 of 1 MiB takes on one core.

    The best of three: threads of the last slice may still spin, which is no load of others.
    """
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        hashlib.sha256(_BYTES).digest()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
