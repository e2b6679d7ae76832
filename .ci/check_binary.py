"""Checks of a finished build: ``check_binary.py BUILD_FOLDER LIBRARY TORCH_FOLDER``.

LIBRARY is _cpu.so; a _cuda.so beside it is checked too.

1. The objects of the instruction set levels hold no weak symbol: the linker could merge wide code into a narrow level.
2. The libraries use no function of torch's stable ABI that is newer than TORCH_TARGET_VERSION (2.10), so that one wheel
   serves every torch from there on.
3. They need neither the CUDA runtime nor what only a torch with CUDA has, so that they load on every machine.
"""

import re
import subprocess
import sys
from pathlib import Path

TARGET = (2, 10)
NEWER = re.compile(r"#if.*TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_0")


def symbols(path: Path, *flags: str) -> list[tuple[str, str]]:
    """(type, name) of each symbol."""
    lines = subprocess.run(["nm", *flags, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(fields[-2], fields[-1]) for line in lines if len(fields := line.split()) >= 2]


def weak_symbols(build: Path) -> list[str]:
    """Weak definitions in the objects of csrc/cpu/isa."""
    objects = sorted(build.rglob("isa/*.o"))
    assert objects, f"no isa/*.o below {build}"
    return [f"{o.name}: {name}" for o in objects for kind, name in symbols(o) if kind in "WVu"]


def declared_after_target(header: Path) -> set[str]:
    """Functions that a torch header declares only for versions newer than the target."""
    newer, stack = set(), []
    for line in header.read_text(errors="replace").splitlines():
        if line.startswith("#if"):
            match = NEWER.match(line)
            stack.append(match is not None and tuple(map(int, match.groups())) > TARGET)
        elif line.startswith("#endif") and stack:
            stack.pop()
        elif any(stack):
            newer.update(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    return newer


def used_symbols(library: Path) -> set[str]:
    """What a library expects others to define."""
    used = {name for _, name in symbols(library, "-D", "--undefined-only")}
    assert "torch_library_impl" in used, f"{library} does not look like one of torch's stable ABI"
    return used


def cuda_needs(library: Path) -> list[str]:
    """Libraries and symbols of CUDA that a library does not bring itself."""
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    files = re.findall(r"NEEDED.*\[(\S*cuda\S*)\]", needed)
    of_cuda = {name for name in used_symbols(library) if "cuda" in name.lower()}
    return files + sorted(of_cuda - {"aoti_torch_device_type_cuda"})  # every torch has this one


def main(build: Path, library: Path, torch: Path) -> int:
    """0 if all checks pass."""
    cuda = library.with_name("_cuda.so")
    libraries = [library, *([cuda] if cuda.exists() else [])]
    problems = [f"weak symbol {name}" for name in weak_symbols(build)]
    problems += [f"{path.name} needs {name}" for path in libraries for name in cuda_needs(path)]
    newer: set[str] = set()
    for header in [
        *torch.glob("include/torch/csrc/stable/c/*.h"),
        *torch.glob("include/torch/csrc/inductor/aoti_torch/c/*.h"),
    ]:
        newer |= declared_after_target(header)
    assert newer, "found no function newer than 2.10 in the headers: the check would be empty"
    for path in libraries:
        problems += [f"{path.name} uses {name}, newer than torch 2.10" for name in sorted(used_symbols(path) & newer)]
    for problem in problems:
        print(problem)
    names = ", ".join(path.name for path in libraries)
    print(f"check_binary: {names}; {len(newer)} newer functions known, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
