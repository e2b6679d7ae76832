"""The machine that a run is on: what it is, whether it computes bfloat16, and whether others keep it busy."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hbert_kernels
from hbert.processor import ALLOWED, identity, multiplies_bf16
from hbert.revision import measured_revision

_PACKAGES = ("hbert", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


def native_bf16(device: torch.device) -> bool:
    """Tells whether the device has fast instructions for bfloat16 products (AVX512-BF16, AMX, Arm BF16; CUDA)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies_bf16(_read("/proc/cpuinfo"))


def resolve_dtype(asked: str, device: torch.device) -> str:
    """What was asked for; for "auto" "bf16" where the device has instructions for it, else "fp32"."""
    if asked != "auto":
        return asked
    return "bf16" if native_bf16(device) else "fp32"


def describe(device: torch.device) -> dict[str, Any]:
    """What a run records of the machine."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        **identity(_read("/proc/cpuinfo")),
        "cores": len(ALLOWED),
        "threads": torch.get_num_threads(),
        "cpu_capability": hbert_kernels.cpu_capability(),
        "device": device.type,
        **gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def software() -> dict[str, str]:
    """Version of Python and of every package that has a part in the result, and the revision of this code."""
    versions = {name: _version(name) for name in _PACKAGES}
    revision = measured_revision(Path(hbert_kernels.__file__).parent, Path(__file__).parents[2])
    return {"python": platform.python_version(), **versions, "revision": revision}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        from hbert_kernels import __version__

        return __version__ if name == "hbert" else "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
