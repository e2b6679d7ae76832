"""The version of the package, read from the file of hbert_kernels without importing that, which needs torch."""

from importlib.util import find_spec
from pathlib import Path
from runpy import run_path


def _read() -> str:
    spec = find_spec("hbert_kernels")
    assert spec is not None and spec.origin is not None  # of the same wheel
    return run_path(str(Path(spec.origin).with_name("_version.py")))["__version__"]


__version__ = _read()
