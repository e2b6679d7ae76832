"""What nvcc makes of csrc/cuda: registers, stack and shared memory of every kernel, and its widest loads.

``python tests/gpu/cuda_resources.py``: measure, and make that the budget (tests/gpu/cuda_budget.json).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
from pathlib import Path

from cuda_shim_build import KERNELS, ROOT, cuda_home, ninja

BUDGET = Path(__file__).with_name("cuda_budget.json")
ARCHITECTURES = ("80", "90", "100")
BUILD = ROOT / "build/cuda_resources"
# A kernel that spills does not compile.
NVCC_FLAGS = "-std=c++17 -O3 -Xptxas -warn-spills,-Werror"
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_DTYPES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16"}
_SOURCES = ("plain", "residual", "activation", "gated")


def compiled(architecture: str) -> list[Path]:
    """The objects of all kernels for one architecture."""
    lines = [
        f"nvcc = {cuda_home()}/bin/nvcc {NVCC_FLAGS} -arch=sm_{architecture}",
        "rule nvcc\n command = $nvcc -MD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
    ]
    sources = sorted(KERNELS.glob("*.cu"))
    lines += [f"build {source.stem}.o: nvcc {source}" for source in sources]
    ninja(BUILD / architecture, "\n".join(lines) + "\n")
    return [BUILD / architecture / f"{source.stem}.o" for source in sources]


def tool(name: str) -> str:
    """A program of the CUDA toolkit, which triton ships for itself."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None, f"{name} comes with triton: pip install triton"
    return str(Path(triton.origin).parent / "backends/nvidia/bin" / name)


def readable(symbol: str, stem: str) -> str:
    """``row_norm: forward_kernel<bfloat16, gated>`` for a mangled kernel of row_norm.cu."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\w+_kernel)(?:<([^>]*)>)?\(", name)
    assert match is not None, name
    arguments = [a.strip() for a in (match.group(2) or "").split(",")]
    arguments = [_DTYPES.get(a, a) for a in arguments]
    arguments = [_SOURCES[int(a[-1])] if "RowSource" in a else a for a in arguments]
    return f"{stem}: {match.group(1)}" + (f"<{', '.join(arguments)}>" if arguments != [""] else "")


@functools.cache
def usage(architecture: str) -> dict[str, dict[str, int]]:
    """Registers, stack, static shared and local memory of every kernel."""
    found = {}
    for path in compiled(architecture):
        text = subprocess.run(
            [tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        for symbol, *numbers in _USAGE.findall(text):
            values = dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True))
            found[readable(symbol, path.stem)] = values
    return found


@functools.cache
def instructions(architecture: str) -> dict[str, str]:
    """The machine code of every kernel as text."""
    found = {}
    for path in compiled(architecture):
        text = subprocess.run([tool("cuobjdump"), "-sass", path], capture_output=True, text=True, check=True).stdout
        for part in text.split("Function : ")[1:]:
            symbol, _, code = part.partition("\n")
            found[readable(symbol.strip(), path.stem)] = code
    return found


def main() -> None:
    measured = {a: {k: v["registers"] for k, v in sorted(usage(a).items())} for a in ARCHITECTURES}
    BUDGET.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
