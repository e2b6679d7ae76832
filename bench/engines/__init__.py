"""Runtimes beside torch. What they load is made by bench/exports.py; their processes have no torch."""

from __future__ import annotations

from importlib.util import find_spec

_PACKAGES = {  # to import, by the beginning of a peer's name
    "ort-": ("onnx", "onnxruntime"),
    "ov-": ("openvino",),
    "ov-int8": ("openvino", "nncf"),
    "torchao-": ("torchao",),
    "ct2-": ("ctranslate2",),
}
DISTRIBUTIONS = {"ort": "onnxruntime", "ov": "openvino", "ct2": "ctranslate2"}  # of the runtime itself
OPENMP = ("ct2",)  # runtimes whose threads are those of OpenMP


def needed(peer: str) -> tuple[str, ...]:
    """The packages that a peer needs beyond torch and transformers."""
    fitting = [beginning for beginning in _PACKAGES if peer.startswith(beginning)]
    return _PACKAGES[max(fitting, key=len)] if fitting else ()


def not_installed(peer: str) -> str | None:
    """Which package of a peer is not installed, and the line that installs it; None where all are."""
    missing = [package for package in needed(peer) if find_spec(package) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} not installed: pip install {' '.join(missing)}"


def family(peer: str) -> str:
    """The runtime of a peer: ort, ov, ct2; any other beginning for those of torch."""
    return peer.partition("-")[0]
