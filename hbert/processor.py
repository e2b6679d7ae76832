"""What Linux tells of a processor: which one it is, what it computes fast, which cores of it this process may use, how
long threads wait for it. No torch: bench needs none.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
# Intel's processors with AVX512-FP16 have AMX, too, and multiply bfloat16 by AVX-512 at half the rate of float32: where
# a virtual machine hides AMX, that is what is left.
_MADE_FOR_AMX = {"avx512_bf16", "avx512_fp16"}
_MODEL = (  # x86, Arm
    ("cpu family", "model", "stepping"),
    ("CPU implementer", "CPU part", "CPU variant", "CPU revision"),
)
# As the process was started: where OMP_PROC_BIND or OMP_PLACES is set, the OpenMP of torch binds the thread that loads
# it to one core. So hbert and bench import this module before anything else.
ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def identity(cpuinfo: str) -> dict[str, str]:
    """Which processor it is, by the text of /proc/cpuinfo, which may be empty.

    `cpu` is its name; `cpu_model`, where the system tells it, is family/model/stepping, on Arm
    implementer/part/variant/revision: AMD EPYC in a virtual machine is the name of several generations.
    """
    name = _field(cpuinfo, "model name") or platform.processor() or platform.machine()
    for fields in _MODEL:
        if all(found := [_field(cpuinfo, field) for field in fields]):
            return {"cpu": name, "cpu_model": "/".join(found)}
    return {"cpu": name}


def label(record: Mapping[str, str]) -> str:
    """The processor of a record that has the keys of `identity`, for a reader. Records of before have no model."""
    return f"{record['cpu']} ({record['cpu_model']})" if record.get("cpu_model") else record["cpu"]


def _field(cpuinfo: str, name: str) -> str:
    """Of the first processor; empty if it has no such field."""
    found = re.search(rf"^{name}[ \t]*:[ \t]*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""


def instructions(cpuinfo: str) -> set[str]:
    """The instruction set extensions of the first processor in the text of /proc/cpuinfo (x86 and Arm)."""
    return set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())


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
