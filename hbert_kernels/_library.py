"""The torch library "hbert_kernels": where schemas are defined, and the compiled library that implements them.

Schemas are defined once, here in Python; C++ registers implementations through torch's stable ABI, so that one binary
serves every torch from 2.10 on. Nothing below raises when the binary is absent or unusable: :func:`load_failure` says
why.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

CPU_CAPABILITIES = (
    ("scalar", "neon_dot")
    if platform.machine() == "aarch64"
    else ("scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx")
)
_HERE = Path(__file__).resolve().parent
_BINARY = _HERE / "_cpu.so"
_CUDA_BINARY = _HERE / "_cuda.so"
# Of the schemas, and of the functions that are no ops: a new number for each change, here and in csrc/abi.h.
_ABI = b"hbert_abi 1"
_TAGS = (torch.Tag.pt2_compliant_tag,)

_library = torch.library.Library("hbert_kernels", "DEF")
# The compiled CUDA kernels: the same schemas once more, because on a GPU several backends can serve an op.
_cuda_library = torch.library.Library("hbert_kernels_cuda", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define an op of the library and its fake (shape and dtype propagation)."""
    _library.define(schema, tags=_TAGS)
    _cuda_library.define(schema, tags=_TAGS)
    torch.library.register_fake(f"hbert_kernels::{schema.split('(')[0]}", fake, lib=_library)


def define_untraced(schema: str) -> None:
    """Define an op of the library that graphs do not hold and GPUs do not run."""
    _library.define(schema)


def implement(name: str, function: Callable[..., Any], key: str) -> None:
    """Make ``function`` the implementation of an op of the library for a dispatch key ("CPU", "CUDA")."""
    _library.impl(name, function, key)


# Not "pip install .": in the folder of the sources Python finds these, and not what was installed elsewhere.
_BUILD_HERE = "pip install --no-deps --editable ."


def build_info() -> dict[str, Any]:
    """What setup.py recorded about the build: built or not, why not, compiler, flags, source revision."""
    path = _HERE / "build_info.json"
    if not path.exists():
        return {"built": False, "reason": "this is a source tree that was never built", "fix": _BUILD_HERE}
    return json.loads(path.read_text())


def _check_capability_cap() -> None:
    cap = os.environ.get("HBERT_CPU_CAPABILITY")
    if cap is not None and cap not in CPU_CAPABILITIES:
        raise ValueError(f"HBERT_CPU_CAPABILITY={cap!r} is unknown; allowed: {', '.join(CPU_CAPABILITIES)}")


def _load(binary: Path, info: dict[str, Any]) -> str | None:
    if not binary.exists():
        reason, fix = info.get("reason", "the library is missing"), info.get("fix", f"{_BUILD_HERE} --force-reinstall")
        return f"not built: {reason} (fix: {fix})"
    # Looked up in the file: what is loaded is registered, and would be called with arguments of other schemas.
    if _ABI + b"\0" not in binary.read_bytes():
        return f"{binary.name} is built from other sources (fix: {_BUILD_HERE} --force-reinstall)"
    try:
        torch.ops.load_library(str(binary))
    except OSError as error:
        # torch says that it could not; what the loader said, such as a missing symbol, is the cause.
        reason = error.__cause__ or error
        return f"{binary.name} does not load: {reason} (fix: reinstall with torch >= 2.10 in this environment)"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return _load(_CUDA_BINARY, build_info().get("cuda", {}))


# Once, at import: a traced graph must find an answer here, not a file system.
_check_capability_cap()
_FAILURE = _load(_BINARY, build_info())
_CUDA_FAILURE = _load_cuda()


def load_failure() -> str | None:
    """None when the compiled library is usable, otherwise the reason and the fix."""
    return _FAILURE


def cuda_load_failure() -> str | None:
    """None when the compiled CUDA library is usable by this torch, otherwise the reason and the fix."""
    return _CUDA_FAILURE


@functools.cache
def cuda_architectures() -> list[str]:
    """The architectures that the CUDA library was compiled for, such as "80"; empty without it."""
    if cuda_load_failure() is not None:
        return []
    name = ctypes.CDLL(str(_CUDA_BINARY)).hbert_cuda_architectures
    name.restype = ctypes.c_char_p
    return name().decode().split(",")


@functools.cache
def compiled_function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the compiled CPU library that is no op, by its name and the ctypes of its signature."""
    function = ctypes.CDLL(str(_BINARY))[name]
    function.restype, function.argtypes = result, arguments
    return function


@functools.cache
def cpu_capability() -> str:
    """The instruction set level that the compiled CPU kernels use here, or "none" without compiled kernels."""
    if load_failure() is not None:
        return "none"
    return compiled_function("hbert_cpu_capability", ctypes.c_char_p)().decode()


class PackedWeightLayout(NamedTuple):
    """How the compiled packed_linear reads a weight; see csrc/cpu/packed_linear.h."""

    panel: int
    group: int
    steps: int


@functools.cache
def packed_weight_layout(bfloat16: bool) -> PackedWeightLayout:
    """The layout of this process's instruction set level; any would do without compiled kernels."""
    if load_failure() is not None:
        return PackedWeightLayout(8, 1, 1)
    field = compiled_function("hbert_packed_weight_layout", ctypes.c_int64, ctypes.c_bool, ctypes.c_int32)
    return PackedWeightLayout(*(field(bfloat16, i) for i in range(3)))


class Int8WeightLayout(NamedTuple):
    """How the compiled int8_linear reads a weight; see csrc/cpu/int8_linear.h."""

    panel: int
    group: int
    steps: int
    offset: bool
    bounded_pairs: bool


@functools.cache
def int8_weight_layout() -> Int8WeightLayout:
    """The layout of this process's instruction set level; any would do without compiled kernels."""
    if load_failure() is not None:
        return Int8WeightLayout(8, 1, 1, False, False)
    field = compiled_function("hbert_int8_weight_layout", ctypes.c_int64, ctypes.c_int32)
    return Int8WeightLayout(field(0), field(1), field(2), bool(field(3)), bool(field(4)))
