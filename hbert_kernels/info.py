"""What was built, what runs each op here and why not the rest: ``python -m hbert_kernels.info``."""

from __future__ import annotations

import platform

import torch

from . import _dispatch, _library
from ._version import __version__


def report() -> str:
    """The report as text."""
    build = _library.build_info()
    failure = _library.load_failure()
    capabilities = ", ".join(_library.CPU_CAPABILITIES)
    lines = [
        f"hbert_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"platform: {platform.platform()}",
        f"compiled CPU kernels: {failure or 'loaded'}",
        f"CPU capability: {_library.cpu_capability()} (HBERT_CPU_CAPABILITY caps it: {capabilities})",
        f"CUDA device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        "build: " + ", ".join(f"{key} {value}" for key, value in build.items()),
        "",
    ]
    return "\n".join(lines) + "\n".join(_dispatch.explain(op) for op in (*_dispatch.OPS, *_dispatch.INFERENCE_OPS))


if __name__ == "__main__":
    print(report())
