"""The ops on CUDA and HIP devices: which kernels can run there, and the way from an op's CUDA key to them.

Neither Triton nor a module that needs it is imported before a tensor on such a device does. None of these kernels has
run on a GPU yet: docs/gpu.md says how each is verified without one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _library
from .triton import limits

_ROW_NORMS = ("layer_norm", "add_layer_norm", "activation_layer_norm", "gated_layer_norm")
_COMPILED = "compiled"  # in the CUDA library, as ops of the same names
# The module of this package that implements an op for a backend. An implementation has the arguments and results of
# the op's schema.
_IMPLEMENTATIONS = {
    "triton": {op: "triton.row_norm" for op in _ROW_NORMS}
    | {
        "conv_layer_norm": "triton.conv_layer_norm",
        "additive_pool": "triton.additive_pool",
        "additive_attention": "gpu.additive_attention",
        "masked_lm_loss": "triton.masked_lm_loss",
    },
    "cuda": dict.fromkeys((*_ROW_NORMS, "additive_pool"), _COMPILED)
    | {"additive_attention": "gpu.additive_attention", "attention": "gpu.attention"},
}
# add_layer_norm shares layer_norm's, and the forward of the loss returns the gradients.
_BACKWARD = {"add_layer_norm": "layer_norm_backward", "masked_lm_loss": None}
_CUDA_MAX_WIDTH, _CUDA_MAX_HEADS = 4096, 64  # of csrc/cuda
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_HEAD_MULTIPLE, _FLASH_MAX_HEAD = 8, 256
_FLASH_MIN_CAPABILITY = (8, 0)  # of NVIDIA's devices

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _device_refusal(tensors: tuple[Any, ...]) -> str | None:
    given = [t for t in tensors if isinstance(t, Tensor)]
    if not given:
        return None if torch.cuda.is_available() else "this torch sees no CUDA or HIP device"
    for t in given:
        if not t.is_cuda:
            return f"runs on CUDA and HIP devices, an input is on {t.device}"
        if t.dtype == torch.float64:
            return "has no float64 kernel"
    return None


def triton_refusal(*tensors: Any) -> str | None:
    """The refusal that all Triton kernels share."""
    if reason := _device_refusal(tensors):
        return reason
    return None if _HAS_TRITON else "triton is not installed (fix: pip install triton)"


def _triton_rows(x: Tensor | None = None, *others: Any) -> str | None:
    reason = triton_refusal(x, *others)
    return reason if reason or x is None else limits.width_refusal(x.shape[-1])


def _triton_conv(
    x: Tensor | None = None, weight: Any = None, bias: Any = None, conv_weight: Tensor | None = None
) -> str | None:
    reason = triton_refusal(x, weight, bias, conv_weight)
    if reason or x is None or conv_weight is None:
        return reason
    return limits.ring_refusal(x.shape[-1], conv_weight.shape[0])


@functools.cache
def pool_memory_refusal(device: int) -> str | None:
    """Why a device's shared memory is too small for the Triton pool; what it needs on AMD is less, and fits."""
    have = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if torch.version.hip is not None or have >= limits.POOL_SHARED_BYTES:
        return None
    return f"needs {limits.POOL_SHARED_BYTES >> 10} KiB of shared memory, this device has {have >> 10}"


def _triton_pool(x: Tensor | None = None, *others: Tensor | None) -> str | None:
    if (reason := triton_refusal(x, *others)) or x is None:
        return reason
    scorer = others[-1] if others else None
    if scorer is not None and (reason := limits.pool_refusal(x.shape[-1], scorer.shape[-2])):
        return reason
    return pool_memory_refusal(x.device.index) if _may_ask_device() else None


def _may_ask_device() -> bool:
    """Fake tensors have no device to ask, and a traced graph asks again when it runs: the router below."""
    return torch.cuda.is_available() and not torch.compiler.is_compiling()


def _device_of(*tensors: Any) -> int:
    """The index of the device of the first tensor; without one, of the current device."""
    return next((t.device.index for t in tensors if isinstance(t, Tensor)), torch.cuda.current_device())


@functools.cache
def architecture_refusal(device: int) -> str | None:
    """Why the compiled kernels do not run on a device: binaries serve their major version, PTX all newer ones."""
    capability = torch.cuda.get_device_capability(device)
    built = [divmod(int(name), 10) for name in _library.cuda_architectures()]
    serves = any(major == capability[0] and minor <= capability[1] for major, minor in built)
    if serves or capability > max(built):
        return None
    names = ", ".join(f"{major}.{minor}" for major, minor in built)
    return f"is compiled for compute capabilities {names} and newer, this device has {capability[0]}.{capability[1]}"


def cuda_refusal(*tensors: Any) -> str | None:
    """The refusal that all kernels of the CUDA library share."""
    if reason := _library.cuda_load_failure() or _device_refusal(tensors):
        return reason
    if not _may_ask_device():
        return None
    return architecture_refusal(_device_of(*tensors))


def _cuda_rows(x: Tensor | None = None, *others: Any) -> str | None:
    if (reason := cuda_refusal(x, *others)) or x is None:
        return reason
    width = x.shape[-1]
    return None if width <= _CUDA_MAX_WIDTH else f"rows are at most {_CUDA_MAX_WIDTH} wide, got {width}"


def _cuda_pool(x: Tensor | None = None, *others: Tensor | None) -> str | None:
    if (reason := _cuda_rows(x, *others)) or x is None or not others or others[-1] is None:
        return reason
    num_heads = others[-1].shape[-2]
    return None if num_heads <= _CUDA_MAX_HEADS else f"has at most {_CUDA_MAX_HEADS} heads, got {num_heads}"


@functools.cache
def flash_refusal(device: int) -> str | None:
    """Why torch's flash attention does not run on a device. Of AMD's devices torch decides when it is called."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "is torch's flash attention, and this torch is built without it"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability >= _FLASH_MIN_CAPABILITY:
        return None
    major, minor = capability
    return f"is torch's flash attention: compute capability 8.0 and newer, this device has {major}.{minor}"


def attention_refusal(qkv: Tensor | None = None, dropout_p: float = 0.0, num_heads: int | None = None) -> str | None:
    """Where torch's own flash attention does not serve packed sequences."""
    if reason := _device_refusal((qkv,)):
        return reason
    if dropout_p > 0:
        return f"has no dropout of attention weights, and dropout_p is {dropout_p}"
    if qkv is not None and qkv.dtype not in _FLASH_DTYPES:
        return f"is torch's flash attention: float16 or bfloat16, got {qkv.dtype}"
    if qkv is not None and num_heads is not None:
        head = qkv.shape[1] // 3 // num_heads
        if head % _FLASH_HEAD_MULTIPLE or head > _FLASH_MAX_HEAD:
            return f"is torch's flash attention: heads of a multiple of 8 up to 256 numbers, got {head}"
    return flash_refusal(_device_of(qkv)) if _may_ask_device() else None


def operators(op: str) -> list[str]:
    """The operators of the torch library that a public op runs, forward and backward."""
    return [name for name in (op, _BACKWARD.get(op, f"{op}_backward")) if name]


@functools.cache
def implementation(backend: str, op: str, name: str) -> Callable[..., Any]:
    """What runs the operator ``name`` of a public op."""
    module = _IMPLEMENTATIONS[backend][op]
    if module == _COMPILED:
        return getattr(torch.ops.hbert_kernels_cuda, name).default
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def router(op: str, name: str) -> Callable[..., Any]:
    """``name``, an op of the torch library, by the backend that serves the public ``op`` on the inputs' device."""

    def run(*arguments: Any) -> Any:
        device = arguments[0].device
        backend = _dispatch.select(op, arguments[0])
        if backend == "reference":  # requested after the forward pass, or the compilation, that led here
            backend, _ = _dispatch.automatic(op, arguments[0])
        if backend not in _IMPLEMENTATIONS:
            raise _dispatch.BackendError(f"no GPU kernel can run: {_dispatch.explain(op, arguments[0])}")
        function = implementation(backend, op, name)
        if device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return run


_Refusal = Callable[..., "str | None"]
_REFUSALS: dict[tuple[str, str], _Refusal] = {
    ("triton", "conv_layer_norm"): _triton_conv,
    ("triton", "additive_pool"): _triton_pool,
    ("triton", "additive_attention"): _triton_pool,  # its scorer comes last, too
    ("triton", "masked_lm_loss"): triton_refusal,
    ("cuda", "additive_pool"): _cuda_pool,
    ("cuda", "additive_attention"): _cuda_pool,
    ("cuda", "attention"): attention_refusal,
}


def _register() -> None:
    by_default: dict[str, _Refusal] = {"triton": _triton_rows, "cuda": _cuda_rows}
    for backend, ops in _IMPLEMENTATIONS.items():
        for op in ops:
            _dispatch.register(op, backend, _REFUSALS.get((backend, op), by_default[backend]))
    by_operator = {name: op for op in _dispatch.OPS for name in operators(op)}
    for name, op in by_operator.items():
        _library.implement(name, router(op, name), "CUDA")


_register()
