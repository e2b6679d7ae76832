"""Which instruction set levels this CPU has below that of this process, by what Linux tells of it."""

import re
from pathlib import Path

from hbert_kernels import cpu_capability
from hbert_kernels._library import CPU_CAPABILITIES

_CPUINFO = Path("/proc/cpuinfo")
_AVX2, _AVX512 = {"avx2", "fma", "f16c"}, {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
# That bfloat16 products are fast is no flag, but below AMX they always are.
NEEDED = {
    "avx2": _AVX2,
    "avx2_vnni": _AVX2 | {"avx_vnni"},
    "avx512": _AVX512,
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "neon_dot": {"asimddp"},
}


def flags():
    """The names of Linux for what the CPU can do."""
    told = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPUINFO.read_text() if _CPUINFO.exists() else "", re.MULTILINE)
    return set(told[1].split()) if told else set()


OWN = cpu_capability()
BELOW = [
    level for level in CPU_CAPABILITIES[: [*CPU_CAPABILITIES, OWN].index(OWN)] if flags() >= NEEDED.get(level, set())
]
LEFT_OUT = [level for level in CPU_CAPABILITIES if level not in (*BELOW, OWN)]
