"""Where a worker's tensors live, how calls are timed there, and what the header says of that device."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.cpu import Cpu, Step

_FLUSHED = 2  # a flush writes this many times the last-level cache
_UNKNOWN_CACHE = 128 << 20
_REASON = 80  # characters of an error that go into a row
_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "driver_version")


class Device(Protocol):
    """What workers need of a device.

    `flushes`: calls on a cold cache are had by emptying the cache; otherwise the tasks' buffers take turns.
    `has_graphs`: a call can be captured, and its replay is without the host's work.
    `untimed`: calls that come before those of a slice, however many these are.
    """

    name: str
    place: torch.device
    flushes: bool
    has_graphs: bool
    untimed: int

    @property
    def isa(self) -> str | None:
        """The architecture of a GPU; None on a CPU, where it depends on whose kernels run."""

    def describe(self) -> dict[str, str]:
        """Lines of the header."""

    def warm_up(self, step: Step) -> None:
        """The untimed calls before a slice."""

    def time(self, step: Step, group: int, samples: int, flush: bool = False) -> list[float]:
        """Seconds a call of `step`, of `samples` groups of `group` calls; with `flush` each starts uncached."""

    def captured(self, step: Step) -> tuple[Step, str]:
        """The replay of a captured `step`, or `step` itself; and a note on which."""

    def held(self) -> int:
        """Bytes that this process has at the moment."""

    def peak(self, call: Step) -> int:
        """Bytes that this process has at the peak of `call`."""


def peak_extra(device: Device, call: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes that `call` takes at its peak, without those of the tensors that it returns.

    On a CPU every allocator counts, so also workspaces and packed weights of libraries. What the process has kept from
    earlier calls does not count: ask in a fresh process.
    """
    before, results = device.held(), []
    peak = device.peak(lambda: results.extend(call()))
    return peak - before - sum(result.nbytes for result in results)


class Cuda:
    """The first CUDA or HIP device: times between events of its stream, memory as torch's allocator counts it.

    All work runs on a stream of its own: a graph cannot be captured on the default one, and autograd runs a backward
    on the stream of its forward.
    """

    name = "cuda"
    flushes = has_graphs = True
    untimed = 3  # other processes have had the device, and its clocks have dropped

    def __init__(self, api: Any = torch.cuda, place: str = "cuda") -> None:
        self._api, self.place = api, torch.device(place)
        self._stream = api.Stream()
        api.set_stream(self._stream)
        self._scratch: Tensor | None = None

    @property
    def isa(self) -> str:
        properties = self._api.get_device_properties(0)
        if torch.version.hip:
            return properties.gcnArchName.partition(":")[0]
        return f"sm_{properties.major}{properties.minor}"

    def describe(self) -> dict[str, str]:
        properties, cache = self._api.get_device_properties(0), self._cache_bytes() / 2**20
        return {
            "device": properties.name,
            "gpu": f"{self.isa}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB, last-level cache {cache:.0f} MiB",
            "clocks": _clocks(),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "fp32_products": torch.get_float32_matmul_precision(),
        }

    def warm_up(self, step: Step) -> None:
        for _ in range(self.untimed):
            step()
        self._api.synchronize()

    def time(self, step: Step, group: int, samples: int, flush: bool = False) -> list[float]:
        events = [self._timed(step, group, flush) for _ in range(samples)]
        self._api.synchronize()
        return [start.elapsed_time(end) * 1e-3 / group for start, end in events]

    def _timed(self, step: Step, group: int, flush: bool) -> tuple[Any, Any]:
        start, end = (self._api.Event(enable_timing=True) for _ in range(2))
        if flush:
            self._empty_cache()
        start.record()
        for _ in range(group):
            step()
        end.record()
        return start, end

    def _empty_cache(self) -> None:
        if self._scratch is None:
            self._scratch = torch.empty(_FLUSHED * self._cache_bytes(), dtype=torch.uint8, device=self.place)
        self._scratch.zero_()

    def _cache_bytes(self) -> int:
        return getattr(self._api.get_device_properties(0), "L2_cache_size", 0) or _UNKNOWN_CACHE

    def captured(self, step: Step) -> tuple[Step, str]:
        """The replay of a graph of `step`; `step` itself where it cannot be captured: it reads a result, say."""
        graph = self._api.CUDAGraph()
        self.warm_up(step)
        try:
            with self._api.graph(graph, stream=self._stream):
                step()
            graph.replay()
            self._api.synchronize()
        except RuntimeError as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.warm_up(step)
            return step, f"no graph: {said[:_REASON]}"
        return graph.replay, "graph"

    def held(self) -> int:
        self._api.synchronize()
        return self._api.memory_allocated()

    def peak(self, call: Step) -> int:
        self._api.synchronize()
        self._api.reset_peak_memory_stats()
        call()
        self._api.synchronize()
        return self._api.max_memory_allocated()


def _clocks() -> str:
    """Clocks and power limit at this moment as nvidia-smi gives them, or why it does not."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown (nvidia-smi: {type(error).__name__})"
    values = done.stdout.strip().splitlines()[0].split(", ")
    return ", ".join(f"{name} {value}" for name, value in zip(_CLOCKS, values, strict=True))


def missing(name: str) -> str | None:
    """Why there is no device `name` ("cpu", "cuda") here; None where there is."""
    if name == "cpu" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"no CUDA device: torch {torch.__version__} is built without CUDA"
    return f"no CUDA device: torch {torch.__version__} sees none; does nvidia-smi (rocm-smi) list one?"


@functools.cache
def open_device(name: str) -> Device:
    """The device `name` ("cpu", "cuda"), the same one at every call.

    Raises:
        RuntimeError: there is none here.
    """
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(reason)
    return Cpu() if name == "cpu" else Cuda()
