"""The coordinator's end of a worker: a process for one or more peers, one JSON object a line over stdin and stdout."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine

REPLY_SECONDS = 900.0
KEPT, RELEASED = "kept", "released"  # what a worker's C library does with freed memory
HEAP_ALL, HEAP_OURS, HEAP_NONE = HEAPS = ("all", "ours", "none")  # whose workers keep it
ENGINES = "bench.engines."  # modules of workers without torch
ENGINE_MODULE = f"{ENGINES}forward"
_OPENMP = ("OMP_", "MKL_", "KMP_", "GOMP_")
_COORDINATOR = "HBERT_BENCH_COORDINATOR"  # a worker's variable: the id of the process that started it
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_WORKER, _EXPORTER = (Path(__file__).with_name(name) for name in ("worker.py", "exporter.py"))


class WorkerError(RuntimeError):
    """A worker failed at what it was asked for; the message is the reason."""


class WorkerProcess:
    """A process that answers one request at a time.

    Its environment is this process's, but for variables that begin with `without`, and `environment`.
    It has a session of its own, so Ctrl-C reaches the coordinator alone, which then ends it in order.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], without: tuple[str, ...] = ()) -> None:
        kept = {name: value for name, value in os.environ.items() if not without or not name.startswith(without)}
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            list(command),
            env={**kept, **environment, _COORDINATOR: str(os.getpid())},
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def reply(self, timeout: float = REPLY_SECONDS) -> dict[str, Any]:
        """The worker's next line.

        Raises:
            WorkerError: the worker reports a failure, has died, or says nothing for `timeout` seconds (it is ended).
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self._process.kill()
            self._process.wait()
            raise WorkerError(f"no answer within {timeout:.0f} s") from None
        if line is None:
            raise WorkerError(self._cause_of_death())
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def ask(self, do: str, timeout: float = REPLY_SECONDS, **arguments: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer; raises like `reply`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise WorkerError(self._cause_of_death()) from None
        return self.reply(timeout)

    def close(self) -> None:
        """Ends the process: politely through the end of its input, after two seconds, or at Ctrl-C, by force.

        With it what its libraries have started and left behind; not of one that died before: its id may be another's.
        """
        assert self._process.stdin is not None
        leads_its_group = self.alive
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
        finally:
            if leads_its_group:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of a group that has ended
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        last = f": {said[-1]}" if said else ""
        if code == -signal.SIGKILL:
            return f"worker was killed (SIGKILL, most often for lack of memory){last}"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"worker died with {how}{last}"


@dataclass(frozen=True)
class PeerWorker:
    """One peer's place in a process, which may serve others too."""

    process: WorkerProcess
    peer: str

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """As `WorkerProcess.ask`, in the name of the peer."""
        return self.process.ask(do, peer=self.peer, **arguments)


@dataclass(frozen=True)
class Setup:
    """How all workers run: one thread on each of `cpus`, tensors on `device`, and whose `heap` is kept."""

    cpus: list[int]
    device: str = "cpu"
    heap: str = HEAP_ALL


def start_worker(module: str, setup: Setup, keep_heap: bool, openmp: bool = True) -> WorkerProcess:
    """Starts a worker of the tasks that `module` builds; its first line is the greeting.

    `openmp`: it has one OpenMP thread on each core. Without, it has nothing in its environment that says so: OpenVINO
    takes the first core of OMP_PLACES for all that there is. One without torch is told by its environment to keep its
    heap: the others call hbert_kernels.keep_heap.
    """
    cpus, heap = ",".join(map(str, setup.cpus)), KEPT if keep_heap else RELEASED
    command = [sys.executable, str(_WORKER), module, cpus, setup.device, heap]
    allocator = machine.heap_environment() if keep_heap and module.startswith(ENGINES) else {}
    if openmp:
        return WorkerProcess(command, {**allocator, **machine.thread_environment(setup.cpus)})
    return WorkerProcess(command, allocator, without=_OPENMP)


def end_with_coordinator() -> None:
    """Called by a worker: where the system is Linux, it ends with the process that started it, whatever it is doing.

    The signal comes when the thread that started the worker ends: the coordinator's main one.

    Raises:
        SystemExit: that process has ended already.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_COORDINATOR) != str(os.getppid()):
        sys.exit("the process that started this worker has ended")


def start_exporter() -> WorkerProcess:
    """Starts the process that exports models; its first line is a greeting without content."""
    return WorkerProcess([sys.executable, str(_EXPORTER)], {}, without=_OPENMP)
