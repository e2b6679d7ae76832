"""Sequences of ops that are recorded once and run in one call, without Python between them (csrc/cpu/program.cpp)."""

from __future__ import annotations

import ctypes
import functools
import struct
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library
from .ops._common import without_gradients

# What stands for an absent tensor or number, and for an output that nobody reads.
_NONE = -(2**63)
_DTYPES = {torch.float32: 6, torch.bfloat16: 15}  # of c10::ScalarType
_INPUTS = 2


_library.define_untraced("load_program(Tensor[] constants, int[] code, int registers, int[] outputs) -> int")
_library.define_untraced("run_program(int program, Tensor x, Tensor cu_seqlens) -> Tensor[]")


class Value:
    """A tensor of a recording: no numbers, only where they will stand."""

    def __init__(self, recorder: Recorder, register: int):
        self.recorder, self.register = recorder, register

    def __add__(self, other: Value) -> Value:
        return self.recorder.step("add", self, other)[0]

    def __mul__(self, other: Value | Tensor) -> Value:
        return self.recorder.step("multiply", self, other)[0]


class _Step(NamedTuple):
    number: int
    arguments: list[int]
    reads: set[int]  # registers among the arguments
    outputs: list[int]


class Recorder:
    """Writes down a program.

    Attributes:
        x: the rows [T, H] that the program is called with.
        cu_seqlens: the tensor that stands for the other input, wherever a step is given it.
    """

    def __init__(self, cu_seqlens: Tensor):
        self.x, self.cu_seqlens = Value(self, 0), cu_seqlens
        self._registers = _INPUTS
        self._constants: list[Tensor] = []
        self._names: dict[int, int] = {}
        self._steps: list[_Step] = []

    def step(self, name: str, *arguments: Any, outputs: int = 1) -> list[Value]:
        """Records a function of csrc/cpu/program.cpp.

        Args:
            arguments: values of this recording, tensors (kept as they are), None, numbers, dtypes. A number that the
                function takes as a double has to be a float.
        """
        codes = [self._code(argument) for argument in arguments]
        reads = {argument.register for argument in arguments if isinstance(argument, Value)}
        values = [Value(self, self._registers + i) for i in range(outputs)]
        self._registers += outputs
        self._steps.append(_Step(_index(name), codes, reads, [value.register for value in values]))
        return values

    def op(self, name: str, *arguments: Any) -> Any:
        """Records an op of the library by its schema: a value, or a tuple of them."""
        schema = getattr(torch.ops.hbert_kernels, name).default._schema
        typed = [
            float(argument) if parameter.type.kind() == "FloatType" else argument
            for parameter, argument in zip(schema.arguments, arguments, strict=True)
        ]
        values = self.step(name, *typed, outputs=len(schema.returns))
        return values[0] if len(values) == 1 else tuple(values)

    def program(self, outputs: Sequence[Value]) -> Program:
        """The program that returns these values."""
        kept = {value.register for value in outputs} | set(range(_INPUTS))
        last = {register: at for at, step in enumerate(self._steps) for register in step.reads}
        code: list[int] = []
        for at, step in enumerate(self._steps):
            written = [register if register in last or register in kept else _NONE for register in step.outputs]
            free = sorted(register for register in step.reads - kept if last[register] == at)
            code += [step.number, *step.arguments, *written, len(free), *free]
        return Program(self._constants, code, self._registers, [value.register for value in outputs])

    def _code(self, argument: Any) -> int:
        if argument is None:
            return _NONE
        if isinstance(argument, Value):
            return argument.register
        if isinstance(argument, Tensor):
            return 1 if argument is self.cu_seqlens else ~self._constant(argument)
        if isinstance(argument, torch.dtype):
            return _DTYPES[argument]
        if isinstance(argument, float):
            return struct.unpack("=q", struct.pack("=d", argument))[0]
        return int(argument)

    def _constant(self, tensor: Tensor) -> int:
        if id(tensor) not in self._names:
            self._names[id(tensor)] = len(self._constants)
            self._constants.append(tensor)
        return self._names[id(tensor)]


class Program:
    """What a :class:`Recorder` wrote down; it holds the constants. It has no gradients, and no copies."""

    def __init__(self, constants: list[Tensor], code: list[int], registers: int, outputs: list[int]):
        self._number = torch.ops.hbert_kernels.load_program(constants, code, registers, outputs)
        weakref.finalize(self, _library.compiled_function("hbert_free_program", None, ctypes.c_int64), self._number)

    def __call__(self, x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        """Runs it on rows [T, H], in the dtype of the recording, and bounds int32 [B+1].

        Raises:
            RuntimeError: a gradient of x can be asked for.
        """
        without_gradients("a program", x)
        return torch.ops.hbert_kernels.run_program.default(self._number, x, cu_seqlens)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The end of one of two with the same number would be that of the other.
        raise TypeError("a program cannot be copied or pickled: record it again")


@functools.cache
def _index(name: str) -> int:
    index = _library.compiled_function("hbert_program_step", ctypes.c_int64, ctypes.c_char_p)(name.encode())
    if index < 0:
        raise KeyError(f"a program has no step {name}")
    return index
