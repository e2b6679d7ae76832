"""What the numbers were measured on: cores and pinning, the processor, the revision, disturbance by other load."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hbert import processor

CLEAR_REFS = Path("/proc/self/clear_refs")
ROOT = Path(__file__).resolve().parents[1]
PINNED = "one per core (checked)"
UNCHECKED = "not checked: this system does not tell the affinity of threads"
_VECTOR_FLAGS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
    "i8mm",
)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cores() -> list[int]:
    """One logical processor for each physical core that this process was started on, in ascending order."""
    first: dict[str, int] = {}
    for cpu in processor.ALLOWED:
        siblings = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip()
        first.setdefault(siblings or str(cpu), cpu)
    return sorted(first.values())


def thread_environment(cpus: list[int]) -> dict[str, str]:
    """Environment that gives a process one OpenMP thread on each of `cpus`.

    It has to be in place before the OpenMP runtime is loaded: unpinned threads of one team are at times put on the
    same core, which reads as half the speed.
    """
    return {
        "OMP_NUM_THREADS": str(len(cpus)),
        "MKL_NUM_THREADS": str(len(cpus)),
        "OMP_PROC_BIND": "close",
        "OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in cpus),
        "OMP_DYNAMIC": "FALSE",
    }


def heap_environment() -> dict[str, str]:
    """Environment in which glibc keeps freed memory as `hbert_kernels.keep_heap` makes it, for processes without it."""
    settings = {"mmap_threshold": 1 << 30, "trim_threshold": 2000 << 20, "top_pad": 64 << 20}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())}


def pinned_cpus() -> set[int] | None:
    """The processors to which exactly one thread of this process is bound; None where the system does not tell."""
    if not hasattr(os, "sched_getaffinity") or not os.path.isdir("/proc/self/task"):
        return None
    masks = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
    return {cpu for mask in masks if len(mask) == 1 for cpu in mask}


def check_pinning(cpus: list[int]) -> str:
    """Describes the pinning of this process's threads, after a parallel region that used all of them.

    Raises:
        RuntimeError: the threads are not bound one to each of `cpus`.
    """
    bound = pinned_cpus()
    if bound is None:
        return UNCHECKED
    if bound != set(cpus):
        raise RuntimeError(
            f"threads are not pinned one per core: wanted them on processors {cpus}, found them bound to "
            f"{sorted(bound) or 'none'}; is another OpenMP runtime preloaded, or a container changing the mask?"
        )
    return PINNED


def busy_threads(call: Callable[[], object], seconds: float = 0.05) -> list[int]:
    """The threads of this process that work while `call` is repeated for so long, the busiest one first.

    One that gets less than a tenth of the busiest one's time does not count. Empty where the system does not tell.
    """
    before = _run_times()
    if not before:
        return []
    end = time.monotonic() + seconds
    call()
    while time.monotonic() < end:
        call()
    worked = {thread: ran - before.get(thread, 0.0) for thread, ran in _run_times().items()}
    ordered = sorted(worked, key=worked.__getitem__, reverse=True)
    return [thread for thread in ordered if worked[thread] > worked[ordered[0]] / 10]


def confine(cpus: list[int]) -> None:
    """Lets the calling thread, and those that it will start, run on `cpus` only, where the system knows of that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def bind(threads: Sequence[int], cpus: list[int]) -> str:
    """Binds as many of the threads of this process as there are `cpus` one to each, and says how many work.

    A thread that is the first to be bound to one of them stays there; a second one on the same core moves.

    Raises:
        OSError: the system does not let it.
        RuntimeError: fewer threads work than there are `cpus`.
    """
    if not threads:
        return UNCHECKED
    if len(threads) < len(cpus):
        raise RuntimeError(
            f"cores stand idle: {len(cpus)} are there to be used, threads that work in a call: {len(threads)}"
        )
    free, homeless = list(cpus), []
    for thread in threads[: len(cpus)]:
        mask = os.sched_getaffinity(thread)
        if len(mask) == 1 and min(mask) in free:
            free.remove(min(mask))
        else:
            homeless.append(thread)
    for thread, cpu in zip(homeless, free, strict=False):
        os.sched_setaffinity(thread, {cpu})
    return f"{len(threads)} thread{'s' if len(threads) > 1 else ''}, {PINNED}"


def _run_times() -> dict[int, float]:
    """Seconds that each thread of this process has run; empty without schedstat."""
    found = {}
    for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
        fields = _read(f"/proc/self/task/{thread}/schedstat").split()
        if len(fields) == 3:
            found[int(thread)] = int(fields[0]) * 1e-9
    return found


def identity() -> dict[str, str]:
    """Name and model of the processor (hbert.processor)."""
    return processor.identity(_read("/proc/cpuinfo"))


def vector_flags() -> list[str]:
    """The instruction set extensions, of those that matter here, which the processor has."""
    have = processor.instructions(_read("/proc/cpuinfo"))
    return [flag for flag in _VECTOR_FLAGS if flag in have]


def multiplies_bf16() -> bool:
    """Whether the processor's products of bfloat16 are faster than those of float32."""
    return processor.multiplies_bf16(_read("/proc/cpuinfo"))


def last_level_cache() -> int:
    """Bytes of the last-level caches of the cores to which this process's threads are bound, else of the first core's.

    32 MiB where the system does not tell.
    """
    sizes = dict(filter(None, map(_largest_cache, pinned_cpus() or {0})))
    return sum(sizes.values()) or 32 << 20


def _largest_cache(cpu: int) -> tuple[str, int] | None:
    """Who shares the largest cache that a processor sees, and its bytes; None where the system does not tell."""
    found = []
    for index in range(5):
        folder = f"/sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
        if (size := _read(f"{folder}/size").strip()).endswith("K"):
            found.append((_read(f"{folder}/shared_cpu_list").strip(), int(size[:-1]) << 10))
    return max(found, key=lambda cache: cache[1], default=None)


def counts_peak_memory() -> bool:
    """Whether this system tells the peak of a process's resident memory, and lets it be set back."""
    return sys.platform.startswith("linux") and CLEAR_REFS.exists()


def short_name() -> str:
    """The processor's name as a part of a file name, e.g. "amd-epyc-7763-8c"."""
    plain = re.sub(r"\((?:r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", identity()["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") + f"-{len(cores())}c"


def describe() -> dict[str, object]:
    """What the report's header says of the machine."""
    return {
        **identity(),
        "cores": len(cores()),
        "instructions": vector_flags(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
