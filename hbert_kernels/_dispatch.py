"""Which implementation runs an op, and why not the others.

A backend that can run an op registers a *refusal*: a function of the op's tensors that returns None (can run) or the
reason why not. ``auto`` takes the first backend without a refusal; naming a backend makes every refusal an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _library

BACKENDS = ("reference", "cpp", "triton", "cuda")
OPS = (
    "layer_norm",
    "add_layer_norm",
    "conv_layer_norm",
    "activation_layer_norm",
    "gated_layer_norm",
    "additive_pool",
    "additive_attention",
    "attention",
    "masked_lm_loss",
)
# For inference on CPUs: they have no gradients, and no kernels for GPUs.
INFERENCE_OPS = (
    "quantize_rows",
    "layer_norm_int8",
    "add_layer_norm_int8",
    "conv_layer_norm_int8",
    "activation_layer_norm_int8",
    "int8_linear",
    "packed_linear",
)
_PREFERENCE = ("cpp", "cuda", "triton")
_Refusal = Callable[..., "str | None"]
_kernels: dict[str, dict[str, _Refusal]] = {op: {} for op in (*OPS, *INFERENCE_OPS)}  # backends in order of preference
_fallbacks_told: set[str] = set()


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run an op on the given inputs."""


def _checked_backend(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; allowed: auto, {', '.join(BACKENDS)}")
    return name


_requested = _checked_backend(os.environ.get("HBERT_BACKEND", "auto"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend.

    ``auto`` (the default, or the environment variable HBERT_BACKEND) falls back to the reference and says so once; a
    named backend raises :class:`BackendError` with the reasons where it cannot run.

    The choice is the process's, not the thread's: it holds for all threads, and blocks that overlap in two of them may
    leave the process on the backend of either. ``reference`` around a backward pass alone changes nothing: kernels that
    ran forward run backward.
    """
    global _requested
    before, _requested = _requested, _checked_backend(name)
    try:
        yield
    finally:
        _requested = before


def register(op: str, backend: str, refuses: _Refusal) -> None:
    """Declare that ``backend`` has a kernel for ``op``; ``refuses(*tensors)`` is None where it can run."""
    registered = _kernels[op] | {backend: refuses}
    _kernels[op] = {name: registered[name] for name in _PREFERENCE if name in registered}


def cpp_refusal(*tensors: Tensor | None) -> str | None:
    """The refusal that all compiled CPU kernels share."""
    failure = _library.load_failure()
    if failure is not None:
        return failure
    for t in tensors:
        if t is not None and not t.is_cpu:
            return f"runs on the CPU, an input is on {t.device}"
    return None


def refusal(op: str, backend: str, *tensors: Any) -> str | None:
    """None if ``backend`` can run ``op`` on these tensors, otherwise why not."""
    if backend == "reference":
        return None
    if backend not in _kernels[op]:
        return "no kernel is written for this op"
    if torch.compiler.is_exporting():
        return "an exported program must not depend on this library"
    return _kernels[op][backend](*tensors)


def _tell_fallback(op: str, reasons: list[str]) -> None:
    # What is for another kind of device was never meant to run.
    reasons = [reason for reason in reasons if ": runs on " not in reason] or reasons
    if torch.compiler.is_compiling() or not reasons or reasons[0] in _fallbacks_told:
        return
    _fallbacks_told.add(reasons[0])
    warnings.warn(f"hbert_kernels.{op} runs on the reference path: {'; '.join(reasons)}", stacklevel=4)


def select(op: str, *tensors: Any) -> str:
    """The backend that runs ``op`` on these tensors.

    Raises:
        BackendError: a backend was requested by name and cannot run.
    """
    if _requested != "auto":
        reason = refusal(op, _requested, *tensors)
        if reason is not None:
            raise BackendError(f"backend {_requested!r} was requested, but {explain(op, *tensors)}")
        return _requested
    backend, reasons = automatic(op, *tensors)
    if backend == "reference":
        _tell_fallback(op, reasons)
    return backend


def automatic(op: str, *tensors: Any) -> tuple[str, list[str]]:
    """The backend that ``auto`` takes, and why each of those before it cannot run."""
    reasons: list[str] = []
    for backend in _kernels[op]:
        reason = refusal(op, backend, *tensors)
        if reason is None:
            return backend, reasons
        reasons.append(f"{backend}: {reason}")
    return "reference", reasons


def explain(op: str, *tensors: Any) -> str:
    """Say which backend runs ``op`` on the given tensors and why each of the others does not.

    Without tensors: what could run at all in this installation.

    Raises:
        ValueError: unknown op.
    """
    if op not in _kernels:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(_kernels)}")
    chosen = None
    lines = []
    for backend in (*_PREFERENCE, "reference"):
        reason = refusal(op, backend, *tensors)
        wanted = _requested in ("auto", backend)
        if reason is None and wanted and chosen is None:
            chosen = backend
            isa = f" ({_library.cpu_capability()})" if backend == "cpp" else ""
            lines.append(f"  {backend}: runs{isa}")
        else:
            other = "not requested" if not wanted else f"{chosen} comes first"
            lines.append(f"  {backend}: {reason or other}")
    return "\n".join([f"{op}: {chosen or 'nothing'} runs", *lines])
