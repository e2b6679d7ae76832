"""Builds csrc/cpu, and csrc/cuda where there is nvcc, into two shared libraries of one wheel with ninja.

The tag is py3-none-<platform>: both go through torch's stable ABI.

Environment:
    HBERT_BUILD      unset: build if it can be done, otherwise a pure-Python install that says why (python -m
                     hbert_kernels.info). 1: build or fail with the reason. 0: pure Python.
    HBERT_TORCH_DIR  the folder of the torch package whose headers are used; default: the torch of the environment that
                     calls pip. The library runs with every torch from 2.10 on, whichever it was built with.
    CXX, CXXFLAGS    the compiler, default the first of g++, c++, clang++, and further flags.
    HBERT_CUDA       unset: compile the CUDA kernels too if nvcc is found, go on without them if that fails. 1: compile
                     them or fail with the reason. 0: do not.
    CUDA_HOME        the CUDA toolkit; then CUDA_PATH, /usr/local/cuda, nvcc on the PATH.
    HBERT_CUDA_ARCHS the GPU architectures to compile for; default: "80,90,100", of these what nvcc knows. Numbers
                     alone, not 90a; the newest is there as PTX too, for later ones.
    HBERT_REVISION   the revision that build_info.json names; default: what git says of this folder.
    HBERT_SANITIZE   1: with the address and undefined-behaviour sanitizers, in build/sanitized (see .ci/sanitizers).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What is built for: _PYTHON_HOST_PLATFORM names another one for cross-compilers.
MACHINE = sysconfig.get_platform().rpartition("-")[2]
MIN_TORCH = (2, 10)
# The oldest torch that the binary runs on: newer stable-ABI functions are then hidden by torch's headers.
TORCH_TARGET_VERSION = "0x020a000000000000"
# Not what CXXFLAGS or the compiler take by default: code of the scalar level runs everywhere, and alone has float64.
_X86 = "-march=x86-64"
_AVX2 = f"{_X86} -mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
_AVX512_BF16 = f"{_AVX512} -mavx512bf16 -mavx512vnni"
# By architecture: its macro, and its levels with their flags, narrowest first, as in csrc/cpu/level.h.
ARCHITECTURES = {
    "x86_64": (
        "HBERT_X86",
        {
            "scalar": f"{_X86} -DHBERT_SCALAR",
            "avx2": _AVX2,
            "avx2_vnni": f"{_AVX2} -mavxvnni",
            "avx512": _AVX512,
            "avx512_vnni": f"{_AVX512} -mavx512vnni",
            "avx512_bf16": _AVX512_BF16,
            "avx512_amx": f"{_AVX512_BF16} -mamx-tile -mamx-bf16 -mamx-int8",
        },
    ),
    "aarch64": ("HBERT_ARM", {"scalar": "", "neon_dot": "-march=armv8.2-a+dotprod"}),
}
ARCHITECTURE, LEVELS = ARCHITECTURES.get(MACHINE, ("", {}))
# What these add are dot products of int8 numbers, which nothing else uses.
DOT_LEVELS, DOT_SOURCES = ("avx2_vnni", "avx512_vnni", "neon_dot"), ("int8_linear",)
# GCC warns of its own AVX-512 headers, whose undefined vectors are meant to be.
WARNINGS = "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
CXX_FLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno {WARNINGS}"
CUDA_ARCHITECTURES = ("80", "90", "100")
SANITIZE = os.environ.get("HBERT_SANITIZE", "0") == "1"
if SANITIZE:
    CXX_FLAGS += " -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
CXX_FLAGS = f"{CXX_FLAGS} {os.environ.get('CXXFLAGS', '')}".rstrip()

# pip keeps the pure-Python wheel that it made of an index's sources, which hold PKG-INFO, and would take it again.
_AGAIN = "--no-cache-dir --no-binary hbert hbert" if (ROOT / "PKG-INFO").exists() else "--editable ."
REINSTALL = f"pip install --force-reinstall --no-deps {_AGAIN}"
INSTALL_TORCH = f"pip install 'torch>=2.10', then {REINSTALL}"
INSTALL_COMPILER = f"install g++ >= 11 or clang++ >= 12, or set CXX, then {REINSTALL}"


class CannotBuild(Exception):
    """Why the compiled part cannot be built here, and what mends it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason} (fix: {fix})")
        self.reason, self.fix = reason, fix


def find_torch() -> Path:
    """The folder of an installed torch >= 2.10, looked up by path: the isolated build environment has none."""
    roots = [Path(p) for k in ("purelib", "platlib") if (p := sysconfig.get_path(k))]
    if "VIRTUAL_ENV" in os.environ:
        roots += sorted(Path(os.environ["VIRTUAL_ENV"]).glob("lib/python3*/site-packages"))
    named = os.environ.get("HBERT_TORCH_DIR")
    candidates = [Path(named)] if named else [root / "torch" for root in [*roots, *map(Path, sys.path)]]
    found = next((c for c in candidates if (c / "version.py").exists()), None)
    if found is None:
        raise CannotBuild("torch is not installed here", INSTALL_TORCH)
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (found / "version.py").read_text())
    if match is None or tuple(map(int, match.groups())) < MIN_TORCH:
        raise CannotBuild(f"the torch in {found} is older than 2.10", INSTALL_TORCH)
    if not (found / "include/torch/csrc/stable/library.h").exists():
        raise CannotBuild(f"the torch in {found} has no C++ headers", INSTALL_TORCH)
    return found


def find_compiler() -> str:
    """The C++ compiler to use, as words of a shell."""
    candidates = [wished] if (wished := os.environ.get("CXX", "").strip()) else ["g++", "c++", "clang++"]
    found = next((path for c in candidates if (path := shutil.which(shlex.split(c)[0]))), None)
    if found is None:
        raise CannotBuild(f"no C++ compiler ({', '.join(candidates)})", INSTALL_COMPILER)
    return wished or shlex.quote(found)


def check_flags(compiler: str, flags: str) -> None:
    """Raises CannotBuild if the compiler refuses the flags, as an older one does."""
    command = shlex.split(f"{compiler} {CXX_FLAGS} {flags} -fsyntax-only -x c++ {os.devnull}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = result.stderr.strip().partition("\n")[0]
        raise CannotBuild(f"{compiler} refuses what the kernels need: {said}", INSTALL_COMPILER)


def output_of(*command: str) -> str:
    """First line of a command's output; empty if it fails or is not installed."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


def ninja_word(word: object) -> str:
    """One word of a command, such as a path, in a ninja file."""
    return shlex.quote(str(word)).replace("$", "$$")


def ninja_path(path: Path) -> str:
    """A path of a build line of a ninja file."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def link_line(torch: Path, to_linker: str) -> str:
    """What both libraries are linked with, each option in place of the braces of ``to_linker``, in a ninja file.

    libtorch.so is named whether a symbol of it is used or not; -z defs: every symbol must be found at link time.
    """
    whole, *parts = (str(torch / "lib" / f"lib{name}.so") for name in ("torch", "torch_cpu", "c10"))
    options = "-z", "defs", "--no-as-needed", whole, "--as-needed", *parts
    return " ".join(ninja_word(to_linker.format(option)) for option in options)


@dataclass(frozen=True)
class Toolchain:
    """What compiles the library on this machine."""

    torch: Path = field(default_factory=find_torch)
    compiler: str = field(default_factory=find_compiler)

    def __post_init__(self) -> None:
        if sys.platform != "linux" or not LEVELS:
            where = f"{sys.platform} {MACHINE}"
            raise CannotBuild(f"kernels are compiled on Linux x86-64 and aarch64 only, not on {where}", "none needed")
        for flags in LEVELS.values():
            check_flags(self.compiler, flags)

    @property
    def command(self) -> str:
        """The compiler and its flags, in a ninja file."""
        return f"{self.compiler} {CXX_FLAGS}".replace("$", "$$")

    def ninja_file(self, output: Path) -> str:
        """The build: each file of csrc/cpu/isa once per level that it differs at, the rest once, one shared library."""
        lines = [
            f"cxx = {self.command} -D{ARCHITECTURE}",
            f"torch = -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -isystem {ninja_word(self.torch / 'include')}",
            "rule cxx\n command = $cxx $extra -MD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
            f"rule link\n command = $cxx -shared $in -o $out {link_line(self.torch, '-Wl,{}')}",
        ]
        objects = []
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: cxx {ninja_path(source)}\n extra = $torch")
        # Nothing is thrown there, and what unwinding would need is a weak symbol of each object.
        for source in sorted((ROOT / "csrc/cpu/isa").glob("*.cpp")):
            for level, flags in LEVELS.items():
                if level in DOT_LEVELS and source.stem not in DOT_SOURCES:
                    continue
                objects.append(f"isa/{source.stem}.{level}.o")
                extra = f"-DHBERT_LEVEL={level} -fno-exceptions {flags}"
                lines.append(f"build {objects[-1]}: cxx {ninja_path(source)}\n extra = {extra}")
        lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}\n")
        return "\n".join(lines)

    def describe(self) -> dict[str, object]:
        """What build_info.json records of a compiled build."""
        version = re.search(r"__version__ = '([^']+)'", (self.torch / "version.py").read_text())
        return {
            "compiler": output_of(*shlex.split(self.compiler), "--version"),
            "flags": CXX_FLAGS,
            "levels": list(LEVELS),
            "torch_headers": version.group(1) if version else "unknown",
            "torch_minimum": ".".join(map(str, MIN_TORCH)),
        }


def find_nvcc() -> str:
    """The CUDA compiler."""
    homes = [os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ] + ["/usr/local/cuda"]
    found = next((path for home in homes if (path := shutil.which(f"{home}/bin/nvcc"))), None) or shutil.which("nvcc")
    if found is None:
        raise CannotBuild("no CUDA compiler (nvcc)", f"install the CUDA toolkit, or set CUDA_HOME, then {REINSTALL}")
    return found


@dataclass(frozen=True)
class CudaToolchain:
    """What compiles the CUDA library beside the other one. torch may be built without CUDA."""

    host: Toolchain
    nvcc: str = field(default_factory=find_nvcc)

    def __post_init__(self) -> None:
        unknown = [a for a in self.architectures if a not in self.known_architectures]
        if unknown or not self.architectures:
            known = ", ".join(self.known_architectures)
            reason = f"{self.nvcc} cannot compile the kernels for {', '.join(unknown) or 'any GPU'}; allowed: {known}"
            raise CannotBuild(reason, f"set HBERT_CUDA_ARCHS, then {REINSTALL}")

    @cached_property
    def known_architectures(self) -> list[str]:
        """What nvcc can compile for, without 90a and its like: hbert_kernels compares numbers with those of devices."""
        listed = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
        return re.findall(r"compute_(\d+)\b", listed)

    @cached_property
    def architectures(self) -> list[str]:
        """What the kernels are compiled for, oldest first."""
        if "HBERT_CUDA_ARCHS" in os.environ:
            return sorted(re.findall(r"\w+", os.environ["HBERT_CUDA_ARCHS"]), key=lambda name: (len(name), name))
        return [a for a in CUDA_ARCHITECTURES if a in self.known_architectures]

    @property
    def code_flags(self) -> str:
        """Machine code for every architecture, and PTX of the newest."""
        codes = [(a, f"sm_{a}") for a in self.architectures]
        newest = self.architectures[-1]
        return " ".join(f"-gencode=arch=compute_{a},code={code}" for a, code in [*codes, (newest, f"compute_{newest}")])

    def ninja_file(self, output: Path) -> str:
        """The build: kernels by nvcc without torch, the binding by the C++ compiler without CUDA, linked by nvcc, which
        knows where its static runtime library is."""
        # Behind a launcher such as ccache, before options.
        *_, host = takewhile(lambda word: not word.startswith("-"), shlex.split(self.host.compiler))
        lines = [
            f"cxx = {self.host.command}",
            f"nvcc = {ninja_word(self.nvcc)} -ccbin {ninja_word(host)} -std=c++17 -O3 {self.code_flags}",
            f"torch = -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -isystem {ninja_word(self.host.torch / 'include')}",
            f"""about = '-DHBERT_CUDA_ARCHITECTURES="{",".join(self.architectures)}"'""",
            "rule cxx\n command = $cxx $torch $about -MD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
            "rule nvcc\n command = $nvcc -Xcompiler=-fPIC,-fvisibility=hidden -MD -MF $out.d -c $in -o $out\n"
            " depfile = $out.d\n deps = gcc",
            "rule link\n command = $nvcc -shared -cudart static $in -o $out"
            # In quotes, because nvcc gives it to a shell of its own.
            f""" -Xlinker=--exclude-libs,ALL {link_line(self.host.torch, '-Xlinker="{}"')}""",
        ]
        objects = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.c*")):
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {ninja_path(source)}")
        lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}\n")
        return "\n".join(lines)

    def describe(self) -> dict[str, object]:
        """What build_info.json records."""
        version = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"release \S+ V?(\S+)", version)
        return {"nvcc": found.group(1) if found else "unknown", "architectures": self.architectures}


def wanted(variable: str) -> str:
    """The value of a switch of the environment: "auto", "0" or "1"."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"hbert: {variable}={value!r} is unknown; allowed: 0, 1 or unset")
    return value


def not_built(obstacle: CannotBuild) -> dict[str, object]:
    """What build_info.json says of a part that is not built."""
    return {"built": False, "reason": obstacle.reason, "fix": obstacle.fix}


def plan() -> tuple[Toolchain | None, dict[str, object]]:
    """The toolchain (None: pure Python) and what build_info.json says."""
    revision = os.environ.get("HBERT_REVISION") or output_of("git", "rev-parse", "--short=12", "HEAD")
    libc = " ".join(platform.libc_ver())
    info: dict[str, object] = {"git": revision, "platform": sysconfig.get_platform(), "libc": libc}
    try:
        if wanted("HBERT_BUILD") == "0":
            raise CannotBuild("HBERT_BUILD=0", f"unset HBERT_BUILD, then {REINSTALL}")
        toolchain = Toolchain()
    except CannotBuild as obstacle:
        if wanted("HBERT_BUILD") == "1":
            sys.exit(f"hbert: HBERT_BUILD=1, but {obstacle}")
        return None, info | not_built(obstacle)
    return toolchain, info | {"built": True} | toolchain.describe()


def plan_cuda(host: Toolchain | None) -> tuple[CudaToolchain | None, dict[str, object]]:
    """The same for the CUDA kernels (None: without)."""
    try:
        if wanted("HBERT_CUDA") == "0":
            raise CannotBuild("built without them (HBERT_CUDA=0)", REINSTALL)
        if host is None:
            raise CannotBuild("the whole package is pure Python", "see the reason of that")
        if SANITIZE:
            raise CannotBuild("HBERT_SANITIZE=1 is for the CPU kernels", f"unset HBERT_SANITIZE, then {REINSTALL}")
        toolchain = CudaToolchain(host)
    except CannotBuild as obstacle:
        if wanted("HBERT_CUDA") == "1":
            sys.exit(f"hbert: HBERT_CUDA=1, but {obstacle}")
        return None, not_built(obstacle)
    return toolchain, {"built": True} | toolchain.describe()


TOOLCHAIN, BUILD_INFO = plan()
CUDA_TOOLCHAIN, BUILD_INFO["cuda"] = plan_cuda(TOOLCHAIN)


def write_build_info(package: Path) -> None:
    """build_info.json in the folder of hbert_kernels, without binaries of an earlier build that would contradict it."""
    (package / "build_info.json").write_text(json.dumps(BUILD_INFO, indent=1) + "\n")
    for name, info in (("_cpu.so", BUILD_INFO), ("_cuda.so", BUILD_INFO["cuda"])):
        if not info["built"]:
            (package / name).unlink(missing_ok=True)


def compiling_failed(name: str) -> None:
    """Ends the build where the environment asks for the library; elsewhere build_info.json says what it is without."""
    variable = {"_cpu": "HBERT_BUILD", "_cuda": "HBERT_CUDA"}[name]
    if wanted(variable) == "1":
        sys.exit(f"hbert: compiling {name}.so failed, see above; {variable}=0 installs without it")
    failed = not_built(CannotBuild(f"compiling {name}.so failed", f"{variable}=1 {REINSTALL} -v says why"))
    BUILD_INFO.update({"cuda": failed} if name == "_cuda" else failed | {"cuda": plan_cuda(None)[1]})


class BuildPython(build_py):
    """Adds build_info.json to the package."""

    def run(self) -> None:
        super().run()
        write_build_info((ROOT if self.editable_mode else Path(self.build_lib)) / "hbert_kernels")


class BuildLibrary(build_ext):
    """Runs ninja; the result is a plain shared library that any Python loads."""

    def run(self) -> None:
        super().run()
        write_build_info((ROOT if self.inplace else Path(self.build_lib)) / "hbert_kernels")

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        if not BUILD_INFO["built"]:
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / name
        (folder / "isa").mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(TOOLCHAINS[name].ninja_file(output))
        ninja = [sys.executable, "-m", "ninja"] if shutil.which("ninja") is None else ["ninja"]
        if subprocess.run([*ninja, "-C", str(folder)], check=False).returncode != 0:
            compiling_failed(name)


class Wheel(bdist_wheel):
    """Tags py3-none-<platform> (compiled) or py3-none-any (pure Python)."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if BUILD_INFO["built"] else "any"


TOOLCHAINS = {name: t for name, t in (("_cpu", TOOLCHAIN), ("_cuda", CUDA_TOOLCHAIN)) if t is not None}
setup(
    # Optional: without it, should compiling fail.
    ext_modules=[Extension(f"hbert_kernels.{name}", [], optional=True) for name in TOOLCHAINS],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
    # A folder of its own: objects of the two builds must never meet in one library.
    options={"build": {"build_base": "build/sanitized"}} if SANITIZE else {},
)
