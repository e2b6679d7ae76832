"""Kernels: one op, forward or backward, against plain torch, torch.compile and the machine's floor, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch._functorch.config
from torch import Tensor

from bench import machine
from bench.device import Device, peak_extra
from bench.floor import Product, Stream
from bench.gate import Checker, in_packed
from bench.harness import FLOOR, MEMORY, Case
from bench.ops import Setting, load
from bench.ops.problem import Function, Problem
from bench.runtime import DTYPES, chosen_backend, hbert_traits, torch_traits
from bench.task import Task
from hbert_kernels import BackendError, explain, use_backend

_BEYOND_CACHE = 2  # buffers that take turns add up to this many times the last-level cache
_WARM_UP_TOKENS = 64
_BACKENDS = ("cpp", "cuda", "triton")

Call = Callable[[], object]

# The backward is timed over and over on one graph, so a compiled one must not take that graph's buffers for its own.
torch._functorch.config.donated_buffer = False


class Subject:
    """What the peers of one case share: the op, its setting, its tensors and its checker.

    A cold case has sets of buffers that take turns; or the device empties its cache before each call.
    """

    def __init__(self, case: Case, device: Device) -> None:
        self.op, self.device = load(case.params["op"]), device
        variant, step = case.params["variant"], case.params["step"]
        self.setting = Setting(variant, case.batch, case.seq, step, case.dtype, str(device.place))
        self.cost = self.op.cost(self.setting)
        self.problem = self.op.problem(self.setting)
        self.checker = Checker(self.problem, backward=self.setting.step != "fwd")
        cold = self.op.cold(self.setting)
        self.flushed = cold and device.flushes
        self.turns = _turns(self.cost.reads + self.cost.writes) if cold and not device.flushes else 1


def _turns(call_bytes: int) -> int:
    """How many sets of buffers have to take turns so that each is out of the cache when its turn comes again."""
    return max(1, -(-_BEYOND_CACHE * machine.last_level_cache() // call_bytes))


class _Turns(Task):
    """Calls on several sets of buffers, one after the other. The last results are kept: the next ones lie elsewhere."""

    capturable = True

    def __init__(self, subject: Subject, calls: Sequence[Call]) -> None:
        self._subject, self.flushed = subject, subject.flushed
        self._calls = calls
        self._results: list[object] = [None] * len(calls)
        self._turn = 0

    def step(self) -> None:
        turn = self._turn = (self._turn + 1) % len(self._calls)
        self._results[turn] = self._calls[turn]()


class Kernel(_Turns):
    """One peer's function of a case: `step` is one forward, backward or both, on the next set of buffers."""

    def __init__(self, subject: Subject, peer: str) -> None:
        self._subject, self._peer = subject, peer
        self._layout = subject.problem.layouts.get(peer)
        self._function = _function(subject.problem, peer)
        super().__init__(subject, [self._call() for _ in range(subject.turns)])

    def _inputs(self) -> list[Tensor]:
        return _inputs(self._subject.problem, self._peer)

    def _call(self) -> Call:
        step, function, inputs = self._subject.setting.step, self._function, self._inputs()
        if step == "fwd":
            return partial(_forward, function, inputs)
        if step == "full":
            return partial(_forward_backward, function, _leaves(inputs))
        return _backward(function, _leaves(inputs))

    def check(self) -> tuple[float, float]:
        """Error and bound of the output or gradient that fits worst; see Checker."""
        checker = self._subject.checker
        check = checker.candidate if self._is_candidate else checker.baseline
        gate = check(in_packed(self._function, self._layout))
        return gate.error, gate.allowed

    @property
    def _is_candidate(self) -> bool:
        return self._peer in self._subject.problem.candidates

    def traits(self) -> dict[str, str]:
        return _traits(self._subject, self._subject.problem, self._peer)


class PeakMemory:
    """One peer's memory in forward and backward, in a process that has done nothing else."""

    resident = Task.resident

    def __init__(self, subject: Subject, peer: str) -> None:
        self._subject, self._peer = subject, peer
        self._few = subject.op.problem(dataclasses.replace(subject.setting, batch=1, seq=_WARM_UP_TOKENS))

    def traits(self) -> dict[str, str]:
        # On few rows: workspaces that a thread keeps would be missing in the peak.
        return _traits(self._subject, self._few, self._peer)

    def peak_memory(self) -> int:
        """Bytes beyond inputs and gradients, after a call on few rows that loads the libraries."""
        self._call(self._few)()
        return peak_extra(self._subject.device, self._call(self._subject.problem))

    def _call(self, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
        return partial(_forward_backward, _function(problem, self._peer), _leaves(_inputs(problem, self._peer)))


class Floor(_Turns):
    """What the machine can do: a stream of the same bytes, as cold, or a packed product of the same size."""

    def __init__(self, subject: Subject) -> None:
        cost, device = subject.cost, subject.device
        calls: list[Stream] | list[Product]
        if cost.gemm is None:
            calls = [Stream(cost.reads, cost.writes, device) for _ in range(subject.turns)]
        else:
            calls = [Product(cost.gemm, DTYPES[subject.setting.dtype], device)]
        self._name = calls[0].name
        super().__init__(subject, calls)

    def check(self) -> tuple[float, float]:
        """Nothing to compare."""
        return 0.0, 0.0

    def traits(self) -> dict[str, str]:
        return {**torch_traits(self._subject.device), "backend": self._name}


def _traits(subject: Subject, problem: Problem, peer: str) -> dict[str, str]:
    """Of a peer that runs the subject's op on a problem."""
    if peer not in problem.candidates:
        return torch_traits(subject.device)
    return hbert_traits(subject.device, _backend(subject.op.name, _function(problem, peer), _inputs(problem, peer)))


def _backend(op: str, function: Function, inputs: list[Tensor]) -> str:
    """The backend that every op inside runs on, otherwise what the op as such runs on."""
    for backend in _BACKENDS:
        try:
            with use_backend(backend):
                _forward(function, inputs)
        except BackendError:
            continue
        return backend
    return chosen_backend(explain(op, inputs[0]))


def _function(problem: Problem, peer: str) -> Function:
    if peer == "compile":
        return torch.compile(problem.baselines["eager"], dynamic=False)
    return {**problem.candidates, **problem.baselines}[peer]


def _inputs(problem: Problem, peer: str) -> list[Tensor]:
    """Activations of its own, in the peer's layout; the parameters are shared, as a model's are."""
    layout = problem.layouts.get(peer)
    rows = [x.clone() if layout is None else layout.from_packed(x) for x in problem.activations]
    return [*rows, *problem.parameters]


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in inputs]


def _outputs(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    made = function(*inputs)
    return (made,) if isinstance(made, Tensor) else made


def _forward(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return _outputs(function, inputs)


def _backward(function: Function, leaves: list[Tensor]) -> Call:
    outputs = _outputs(function, leaves)
    cotangents = [torch.randn_like(output) for output in outputs]
    return partial(torch.autograd.grad, outputs, leaves, cotangents, retain_graph=True)


def _forward_backward(function: Function, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward of the summed outputs (their gradient is a one that takes no memory)."""
    outputs = _outputs(function, leaves)
    return torch.autograd.grad([output.sum() for output in outputs], leaves)


def builder(case: Case, device: Device) -> Callable[[str], Kernel | PeakMemory | Floor]:
    """What builds each peer's task of `case`."""
    torch.compiler.reset()  # the limit of recompilations counts all shapes of the same code
    subject = Subject(case, device)

    def build(peer: str) -> Kernel | PeakMemory | Floor:
        if peer == FLOOR:
            return Floor(subject)
        return (PeakMemory if MEMORY in case.measures else Kernel)(subject, peer)

    return build
