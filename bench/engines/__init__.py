"""Runtimes beside torch. What they load is made by bench/exports.py; their processes have no torch."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = {  # to import, by the beginning of a peer's name
    "ort-": ("onnx", "onnxruntime"),
    "ov-": ("openvino",),
    "ov-int8": ("openvino", "nncf"),
    "torchao-": ("torchao",),
    "ct2-": ("ctranslate2",),
}
DISTRIBUTIONS = {"ort": "onnxruntime", "ov": "openvino", "ct2": "ctranslate2"}  # of the runtime itself
OPENMP = ("ct2",)  # runtimes whose threads are those of OpenMP
_COMPILED = ("hf-compile", "torchao-", "compile")
_NO_COMPILER = (
    "torch.compile needs a C++ compiler (CXX) and the headers of Python: for one, apt install g++ python3-dev"
)


def needed(peer: str) -> tuple[str, ...]:
    """The packages that a peer needs beyond torch and transformers."""
    fitting = [beginning for beginning in _PACKAGES if peer.startswith(beginning)]
    return _PACKAGES[max(fitting, key=len)] if fitting else ()


def not_installed(peer: str) -> str | None:
    """What a peer needs that is not installed, of packages with the line that installs them; None where all is."""
    missing = [package for package in needed(peer) if find_spec(package) is None]
    if not missing:
        return _NO_COMPILER if peer.startswith(_COMPILED) and not _compiles() else None
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} not installed: pip install {' '.join(missing)}"


def _compiles() -> bool:
    """Whether torch.compile finds what it makes code with."""
    compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(compiler) is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def family(peer: str) -> str:
    """The runtime of a peer: ort, ov, ct2; any other beginning for those of torch."""
    return peer.partition("-")[0]
