"""Triton's interpreter, hardened: kernels run on CPU tensors with what a GPU does to them checked.

Importing this module turns interpretation on (TRITON_INTERPRET=1). Triton must not have been imported without it,
as torch._dynamo does: the decorator ``@triton.jit`` looks once, on triton's own library too. The module corrects
the interpreter where it is wrong, for good:

- bfloat16: casts round to nearest even, arithmetic and ``tl.dot`` work; reductions in bfloat16 are refused;
- comparisons of scalars can be combined with blocks in masks;
- ``tl.dot`` of float32 with ``input_precision="tf32"`` sees operands rounded to 10 bits, as a tensor core would.

:func:`checked` watches the launches inside a ``with`` block. A fault raises, wrapped in triton's InterpreterError:

- an address outside the tensors of the launch, or outside the view that was passed;
- two programs of a launch that touch the same byte, one of them writing, with no acquire-release atomic between;
- two lanes of one ``tl.store`` that write the same address.

Programs run in a random order, so that a result that leans on the order changes. The record that the block yields
says what was launched, and what it asked of memory::

    with checked(seed=1) as launches:
        y = kernel_under_test(x)
    assert len(launches) == 1
    assert launches[0].bytes["X"] == x.nbytes  # by the name of the kernel's argument
    assert launches.total_bytes <= 1.05 * (x.nbytes + y.nbytes)

``checked(programs=4)`` runs only 4 randomly chosen programs of each launch and scales the bytes up: the traffic of
a large batch, without its results. conftest.py puts every test inside ``checked()``; the fixture ``launches`` is
its record.

What this cannot see: registers, shared memory, layouts, rounding order of reductions, fused multiply-add, speed.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import math  # noqa: E402
import random  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle  # noqa: E402

if not isinstance(tl.sum, interpreter.InterpretedFunction):
    raise ImportError("triton was imported (by torch._dynamo?) before TRITON_INTERPRET=1 was set")

_builder = interpreter.interpreter_builder


class KernelFault(Exception):
    """A kernel did what would be undefined on a GPU."""


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Values of bfloat16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bfloat16 values, ties to even, as GPUs and torch round."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _round_to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 13) & 1) + 0xFFF) & np.uint32(0xFFFFE000)
    return np.where((bits & 0x7F800000) == 0x7F800000, bits, rounded).astype(np.uint32).view(np.float32)


def _is_bfloat16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(value: object) -> object:
    return TensorHandle(bfloat16_to_float32(value.data), tl.float32) if _is_bfloat16(value) else value


def _rounding_bfloat16(operation: Callable) -> Callable:
    """The builder's operation in float32, its float result rounded, where an operand is bfloat16."""

    def wrapper(self, *operands):
        if not any(_is_bfloat16(operand) for operand in operands):
            return operation(self, *operands)
        result = operation(self, *[_widened(operand) for operand in operands])
        if result.data.dtype != np.float32:
            return result
        return TensorHandle(float32_to_bfloat16(result.data), tl.bfloat16)

    return wrapper


def _truth(comparison: Callable) -> Callable:
    """The comparison as a block of int1: with the operands' type, splatting a scalar would make integers of it."""

    def wrapper(self, *operands):
        return TensorHandle(comparison(self, *operands).data, tl.int1)

    return wrapper


def _cast(self, source, target_type):
    target = target_type.scalar
    if target == tl.bfloat16 and not _is_bfloat16(source):
        return TensorHandle(float32_to_bfloat16(source.data.astype(np.float32)), target)
    data = source.data if target == tl.bfloat16 else _widened(source).data
    return TensorHandle(data.astype(interpreter._get_np_dtype(target_type)), target)


def _float_to_float(original: Callable) -> Callable:
    def create_fp_to_fp(self, source, target_type, rounding):
        if target_type.scalar == tl.bfloat16 and str(rounding).upper().endswith("RTZ"):
            truncated = (source.data.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            return TensorHandle(truncated, tl.bfloat16)
        if tl.bfloat16 in (source.dtype.scalar, target_type.scalar):
            return _cast(self, source, target_type)
        return original(self, source, target_type, rounding)

    return create_fp_to_fp


def _dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    left, right = _widened(a).data, _widened(b).data
    precision = str(input_precision).upper()
    if a.data.dtype == np.float32 and "TF32" in precision and "X3" not in precision:
        left, right = _round_to_tf32(left), _round_to_tf32(right)
    dtype = accumulator.data.dtype
    product = np.matmul(left.astype(dtype), right.astype(dtype))
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _refusing_bfloat16(original: Callable) -> Callable:
    def apply(self, operand):
        operands = operand if isinstance(operand, tuple) else (operand,)
        if any(_is_bfloat16(t.handle) for t in operands):
            raise KernelFault("a reduction or scan in bfloat16: convert to float32 after the load")
        return original(self, operand)

    return apply


_ARITHMETIC = (
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fneg", "create_fcmp", "create_fma"),
    *("create_minimumf", "create_maximumf", "create_minnumf", "create_maxnumf", "create_fabs"),
    *("create_exp", "create_log", "create_sqrt", "create_rsqrt", "create_precise_", "create_approx_divf"),
)


def _correct_arithmetic() -> None:
    for name in dir(InterpreterBuilder):
        if name.startswith(_ARITHMETIC):
            setattr(InterpreterBuilder, name, _rounding_bfloat16(getattr(InterpreterBuilder, name)))
        if name.startswith(("create_icmp", "create_fcmp")):
            setattr(InterpreterBuilder, name, _truth(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _float_to_float(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = _dot
    base = interpreter.ReduceScanOpInterface
    base.apply = _refusing_bfloat16(base.apply)


_correct_arithmetic()


@dataclass
class Launch:
    """One launch: the kernel's name, its grid, and the bytes asked for by the name of the tensor argument."""

    kernel: str
    grid: tuple[int, ...]
    loaded: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)

    @property
    def bytes(self) -> Counter:
        """Bytes loaded and stored, by argument. What several programs load counts several times."""
        return self.loaded + self.stored


class Launches(list):
    """The launches of a ``checked`` block, in order."""

    @property
    def total_bytes(self) -> int:
        """Bytes that all launches together asked for."""
        return sum(sum(launch.bytes.values()) for launch in self)


_MANY = 1 << 30  # the reader of a byte that several programs have read


class _Range:
    """One tensor argument: which program last wrote and last read each of its bytes; 0 for none."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name, self.begin = name, tensor.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.end = self.begin + (reach + 1) * tensor.element_size()
        self._owners: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def owners(self) -> tuple[np.ndarray, np.ndarray]:
        if self._owners is None:
            size = self.end - self.begin
            self._owners = np.zeros(size, np.int32), np.zeros(size, np.int32)
        return self._owners


class _Memory:
    """Checks every access of the programs of one launch against its tensors and against each other."""

    def __init__(self, launch: Launch, tensors: list[tuple[str, torch.Tensor]], scale: float):
        self.launch, self.scale = launch, scale
        self.ranges = [_Range(name, t) for name, t in tensors if t.numel() > 0]
        self.released: set[int] = set()  # programs whose writes an atomic has published
        self.acquired: dict[int, set[int]] = {}

    def access(self, kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.atleast_1d(pointers.data).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.ravel()
        unknown = np.ones(addresses.size, bool)
        for r in self.ranges:
            inside = unknown & (addresses >= r.begin) & (addresses + size <= r.end)
            if inside.any():
                unknown &= ~inside
                self._touch(kind, r, addresses[inside] - r.begin, size)
        if unknown.any():
            raise KernelFault(self._outside(kind, int(addresses[unknown][0]), size))

    def _outside(self, kind: str, address: int, size: int) -> str:
        nearest = min(self.ranges, key=lambda r: max(r.begin - address, address + size - r.end))
        extent = nearest.end - nearest.begin
        where = f"{address - nearest.begin} bytes from the start of {nearest.name}, which has {extent}"
        return f"{kind} of {size} bytes outside all tensors by program {_builder.grid_idx}: {where}"

    def _touch(self, kind: str, r: _Range, offsets: np.ndarray, size: int) -> None:
        counter = self.launch.loaded if kind == "load" else self.launch.stored
        counter[r.name] += round(self.scale * offsets.size * size)
        writers, readers = r.owners
        me = 1 + _program_number()
        if kind == "store":
            if np.unique(offsets).size != offsets.size:
                raise KernelFault(f"program {_builder.grid_idx} stores twice to one address of {r.name} at once")
            self._check(writers[offsets], me, f"writes {r.name}", "wrote")
            self._check(readers[offsets], me, f"writes {r.name}", "read")
            writers[offsets] = me
            self.released.discard(me)
            return
        self._check(writers[offsets], me, f"{kind}s {r.name}", "wrote")
        if kind == "load":
            before = readers[offsets]
            readers[offsets] = np.where((before != 0) & (before != me), _MANY, me)

    def _check(self, others: np.ndarray, me: int, does: str, did: str) -> None:
        clash = others[(others != 0) & (others != me)]
        if clash.size == 0:
            return
        known = self.acquired.get(me, set())
        unknown = [int(other) for other in np.unique(clash) if int(other) not in known]
        if unknown:
            other = "several programs" if unknown[0] == _MANY else f"program number {unknown[0] - 1}"
            raise KernelFault(f"race: program {_builder.grid_idx} {does}, which {other} {did}")

    def atomic(self, pointers: TensorHandle, mask: TensorHandle | None, semantics: object) -> None:
        self.access("atomic", pointers, mask)
        if "ACQUIRE_RELEASE" in str(semantics).upper():
            me = 1 + _program_number()
            self.acquired.setdefault(me, set()).update(self.released)
            self.released.add(me)


def _program_number() -> int:
    (x, y, z), (nx, ny, _) = _builder.grid_idx, _builder.grid_dim
    return x + nx * (y + ny * z)


_launch_kernel = GridExecutor.__call__
_masked_load, _masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_atomic_rmw, _atomic_cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas


def _watching(memory: Callable[[], _Memory]) -> dict[str, Callable]:
    """Methods of the interpreter's builder that report to the launch's memory before they act."""

    def create_masked_load(self, pointers, mask, *rest):
        memory().access("load", pointers, mask)
        return _masked_load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        memory().access("store", pointers, mask)
        return _masked_store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation, pointers, value, mask, semantics, scope):
        memory().atomic(pointers, mask, semantics)
        return _atomic_rmw(self, operation, pointers, value, mask, semantics, scope)

    def create_atomic_cas(self, pointers, expected, value, semantics, scope):
        memory().atomic(pointers, None, semantics)
        return _atomic_cas(self, pointers, expected, value, semantics, scope)

    replacements = create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas
    return {function.__name__: function for function in replacements}


@contextmanager
def _replaced(owner: object, attributes: dict[str, object]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def _in_order(grid: tuple[int, ...], order: list[int]) -> Iterator[None]:
    """Of the programs of ``grid``, those in ``order`` take the places of a grid of one dimension."""
    nx, ny = (*grid, 1)[:2]

    def set_grid_dim(*_):
        _builder.grid_dim = (*grid, 1, 1)[:3]

    def set_grid_idx(place, *_):
        number = order[place]
        _builder.grid_idx = number % nx, number // nx % ny, number // (nx * ny)

    _builder.set_grid_dim, _builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        del _builder.set_grid_dim, _builder.set_grid_idx


_patch_lang = interpreter._patch_lang


class _Nothing:
    def restore(self) -> None:
        """There is nothing to restore."""


def _patching_once() -> Callable:
    """For one launch: the interpreter would patch the language again at every call of a device function."""
    patched = set()

    def patch(function):
        languages = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if languages in patched:
            return _Nothing()
        patched.add(languages)
        return _patch_lang(function)

    return patch


@contextmanager
def checked(seed: int = 0, programs: int | None = None) -> Iterator[Launches]:
    """Check every launch inside the block and record it; see the module. Of nested blocks the innermost counts.

    Args:
        seed: of the random order of programs.
        programs: run only so many programs of each launch, and scale its bytes by the share that ran. None: all.

    Raises:
        triton's InterpreterError, whose cause is a :class:`KernelFault`.
    """
    launches, rng = Launches(), random.Random(seed)
    current: list[_Memory] = []

    def call(self, *arguments, **options):
        grid = tuple(self.grid)
        total = math.prod(grid)
        order = rng.sample(range(total), total if programs is None else min(programs, total))
        launch = Launch(self.fn.__name__, grid)
        launches.append(launch)
        named = [*zip(self.arg_names, arguments, strict=False), *options.items()]
        tensors = [(name, value) for name, value in named if isinstance(value, torch.Tensor)]
        current[:] = [_Memory(launch, tensors, total / max(1, len(order)))]
        self.grid = (len(order),)
        with _in_order(grid, order), _replaced(interpreter, {"_patch_lang": _patching_once()}):
            return _launch_kernel(self, *arguments, **options)

    with _replaced(GridExecutor, {"__call__": call}), _replaced(InterpreterBuilder, _watching(lambda: current[0])):
        yield launches
