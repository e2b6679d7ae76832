"""Builds csrc/cuda for the CPU with csrc/testing, the shim that runs CUDA kernels there: a library per sanitizer.

Built with ninja in build/cuda_on_cpu, where only what has changed is compiled again.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
KERNELS, TESTING, BUILD = ROOT / "csrc/cuda", ROOT / "csrc/testing", ROOT / "build/cuda_on_cpu"
MODULE = "hbert_cuda_on_cpu"
# Unsanitized builds are optimised: they run the most.
SANITIZERS = {
    "plain": "-O2",
    # Checks of null pointers and of object sizes would double the time of a build.
    "address": "-O1 -fsanitize=address,undefined -fno-sanitize=null,object-size,vptr -fno-sanitize-recover=all",
    "thread": "-O1 -fsanitize=thread",
}
SCHEDULER = {"plain": "", "address": "-DHBERT_SHIM_ADDRESS", "thread": "-DHBERT_SHIM_THREAD"}
TORCH_TARGET_VERSION = "0x020a000000000000"
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas"


def find_cuda_home() -> Path | None:
    """The folder of the CUDA toolkit, whose headers the kernels include; None without one."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ]
    candidates += [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    return next((c for c in candidates if (c / "include/cuda_bf16.h").exists()), None)


def cuda_home() -> Path:
    """The same, where there must be one."""
    found = find_cuda_home()
    assert found is not None, "no CUDA toolkit: install one, or set CUDA_HOME"
    return found


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Two test runs in one tree build one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ninja(folder: Path, text: str) -> None:
    """Run a build file; raises with the compiler's output if it fails."""
    with exclusive(folder):
        (folder / "build.ninja").write_text(text)
        command = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS", "2")
        result = subprocess.run([*command, "-C", str(folder), "-j", jobs], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def rules() -> list[str]:
    """The compiler, and a rule for objects and one for libraries."""
    return [
        f"cxx = {os.environ.get('CXX', 'g++')} -std=c++17 -g1 -fPIC -fvisibility=hidden {WARNINGS} -DHBERT_CUDA_ON_CPU"
        " '-DHBERT_CUDA_ARCHITECTURES=\"none\"'"
        f" -isystem {cuda_home()}/include",
        "rule compile\n command = $cxx $flags -MD -MF $out.d -x c++ -c $in -o $out\n depfile = $out.d\n deps = gcc",
        "rule link\n command = $cxx $flags $in -o $out $libraries",
    ]


@dataclass(frozen=True)
class Fault:
    """A mistake put into a copy of the kernels: ``text`` of ``file`` becomes ``mistake``; ``kernel`` is compiled."""

    name: str
    file: str
    text: str
    mistake: str
    kernel: str

    def source(self) -> Path:
        """The kernel in its copy of csrc."""
        csrc = BUILD / "faults" / self.name
        with exclusive(BUILD):
            (csrc / "cuda").mkdir(parents=True, exist_ok=True)
            if not (csrc / "testing").exists():
                (csrc / "testing").symlink_to(TESTING)
            for original in KERNELS.iterdir():
                self._copy(original, csrc / "cuda" / original.name)
        return csrc / "cuda" / self.kernel

    def _copy(self, original: Path, copy: Path) -> None:
        text = original.read_text()
        if original.name == self.file:
            assert text.count(self.text) == 1, f"{self.file} has {self.text!r} {text.count(self.text)} times, not once"
            text = text.replace(self.text, self.mistake)
        if not copy.exists() or copy.read_text() != text:  # nothing to compile otherwise
            copy.write_text(text)


def kernel_objects(sanitizer: str, fault: Fault | None = None) -> tuple[list[str], list[str]]:
    """Ninja lines for the kernels and the scheduler, and their objects."""
    lines, objects = [], []
    for source in sorted(KERNELS.glob("*.cu")):
        objects.append(f"{sanitizer}/{source.stem}.o")
        if fault is not None and fault.kernel == source.name:
            objects[-1], source = f"faults/{fault.name}.{sanitizer}.o", fault.source()
        lines.append(f"build {objects[-1]}: compile {source}\n flags = {SANITIZERS[sanitizer]}")
    objects.append(f"{sanitizer}/cuda_shim.o")
    lines.append(f"build {objects[-1]}: compile {TESTING}/cuda_shim.cpp\n flags = -O2 {SCHEDULER[sanitizer]}")
    return lines, objects


def numpy_library(sanitizer: str = "plain", fault: Fault | None = None) -> Path:
    """The Python module of the launchers for NumPy arrays."""
    import pybind11

    includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    lines, objects = kernel_objects(sanitizer, fault)
    lines.append(f"build numpy_binding.o: compile {TESTING}/numpy_binding.cpp\n flags = -O1 {includes}")
    output = f"{fault.name if fault else ''}{sanitizer}/{MODULE}.so"
    lines.append(
        f"build {output}: link {' '.join(objects)} numpy_binding.o\n flags = -shared {SANITIZERS[sanitizer]}\n"
    )
    ninja(BUILD, "\n".join(rules() + lines))
    return BUILD / output


def misuse_program(sanitizer: str) -> Path:
    """csrc/testing/misuse.cu as a program."""
    flags = f"flags = {SANITIZERS[sanitizer]}"
    lines, objects = [], [f"{sanitizer}/misuse.o", f"{sanitizer}/cuda_shim.o"]
    lines.append(f"build {objects[0]}: compile {TESTING}/misuse.cu\n {flags}")
    lines.append(f"build {objects[1]}: compile {TESTING}/cuda_shim.cpp\n flags = -O2 {SCHEDULER[sanitizer]}")
    lines.append(f"build {sanitizer}/misuse: link {' '.join(objects)}\n {flags}\n")
    ninja(BUILD, "\n".join(rules() + lines))
    return BUILD / sanitizer / "misuse"


def torch_library() -> Path:
    """The ops of the library hbert_kernels_cuda for CPU tensors: what _cuda.so is on a GPU, binding included."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    lines, objects = kernel_objects("plain")
    for source in sorted(KERNELS.glob("*.cpp")):
        objects.append(f"{source.stem}.o")
        flags = f"-O1 -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -isystem {torch}/include"
        lines.append(f"build {objects[-1]}: compile {source}\n flags = {flags}")
    libraries = " ".join(f"{torch}/lib/{name}.so" for name in ("libtorch", "libtorch_cpu", "libc10"))
    lines.append(f"build hbert_kernels_cuda.so: link {' '.join(objects)}\n flags = -shared\n libraries = {libraries}\n")
    ninja(BUILD, "\n".join(rules() + lines))
    return BUILD / "hbert_kernels_cuda.so"


def load(library: Path) -> ModuleType:
    """Import a module that :func:`numpy_library` built."""
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
