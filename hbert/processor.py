"""What a processor computes fast, by the flags that Linux gives of it; the benchmark reads it without torch."""

from __future__ import annotations

import re

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
