"""What Linux tells of a processor: what it computes fast, how long threads wait for it. No torch: bench needs none."""

from __future__ import annotations

import re
from pathlib import Path

_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
# Intel's processors with AVX512-FP16 have AMX, too, and multiply bfloat16 by AVX-512 at half the rate of float32: where
# a virtual machine hides AMX, that is what is left.
_MADE_FOR_AMX = {"avx512_bf16", "avx512_fp16"}


def instructions(cpuinfo: str) -> set[str]:
    """The instruction set extensions of the first processor in the text of /proc/cpuinfo (x86 and Arm)."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def multiplies_bf16(cpuinfo: str) -> bool:
    """Tells whether bfloat16 products are faster than float32's (AVX512-BF16, AMX, Arm BF16), by /proc/cpuinfo."""
    flags = instructions(cpuinfo)
    if "GenuineIntel" in cpuinfo and flags >= _MADE_FOR_AMX and "amx_bf16" not in flags:
        return False
    return not _BF16.isdisjoint(flags)


def queue_wait() -> float | None:
    """Seconds that this process's threads have stood ready on a run queue so far; None without schedstat."""
    try:
        fields = [_schedstat(thread) for thread in Path("/proc/self/task").iterdir()]
    except OSError:
        return None
    waits = [int(entry[1]) for entry in fields if len(entry) == 3]
    return sum(waits) * 1e-9 if waits else None


def _schedstat(thread: Path) -> list[str]:
    """Nanoseconds run and waited, and time slices; empty where the thread has ended or the system does not tell."""
    try:
        return (thread / "schedstat").read_text().split()
    except OSError:
        return []
