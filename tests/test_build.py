"""setup.py: what it plans where something is missing, and its ninja files, carried out by compilers that do nothing."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parents[1] / "setup.py"
VARIABLES = ("HBERT_BUILD", "HBERT_CUDA", "HBERT_CUDA_ARCHS", "HBERT_SANITIZE", "CXX", "CXXFLAGS", "CUDA_PATH")
COMPILES_NOTHING = """case " $*" in *" -c "*) exit 1;; esac"""
WITHOUT_LEVELS = """case " $*" in *" -m"*) echo "error: unrecognized command-line option '-mnew'" >&2; exit 1;; esac"""
COMPILER = """[ "$1" != --list-gpu-arch ] || printf "compute_%s\\n" 80 90 90a 100
printf '%s\\n' "$@" >> "$0.log"
while [ $# -gt 0 ]; do [ "$1" != -o ] || : > "$2"; shift; done"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class Tree:
    """A source tree with a torch and compilers of its own, in folders that shells and ninja must not take apart."""

    def __init__(self, tmp_path, monkeypatch):
        self.monkeypatch = monkeypatch
        self.root, self.torch = tmp_path / "a b:c$d", tmp_path / "to $rch"
        self.compiler = program(tmp_path / "b in/g++", COMPILER)
        self.nvcc = program(tmp_path / "cu $da/bin/nvcc", COMPILER)
        self.torch.mkdir()
        (self.torch / "version.py").write_text("__version__ = '2.10.0'\n")
        self.header = self.torch / "include/torch/csrc/stable/library.h"
        self.header.parent.mkdir(parents=True)
        self.header.touch()
        for name in ("cpu/op.cpp", "cpu/isa/op.cpp", "cuda/op.cu", "cuda/binding.cpp"):
            (self.root / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / "csrc" / name).touch()
        shutil.copy(SETUP, self.root)
        for variable in VARIABLES:
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("HBERT_TORCH_DIR", str(self.torch))
        monkeypatch.setenv("CUDA_HOME", str(self.nvcc.parents[1]))
        monkeypatch.setenv("PATH", str(self.compiler.parent), prepend=":")
        monkeypatch.setattr(setuptools, "setup", lambda **options: None)

    def load(self):
        """The module setup.py."""
        spec = importlib.util.spec_from_file_location("hbert_setup", self.root / "setup.py")
        module = importlib.util.module_from_spec(spec)
        self.monkeypatch.setitem(sys.modules, "hbert_setup", module)  # where dataclasses look
        spec.loader.exec_module(module)
        return module


@pytest.fixture
def tree(tmp_path, monkeypatch):
    return Tree(tmp_path, monkeypatch)


def build_library(module, folder):
    """What build_ext leaves in ``folder`` where a library of an earlier build is: build_info.json, and the library."""
    library = folder / "hbert_kernels/_cpu.so"
    library.parent.mkdir(parents=True)
    library.touch()
    extensions = [setuptools.Extension(f"hbert_kernels.{name}", [], optional=True) for name in module.TOOLCHAINS]
    command = module.BuildLibrary(setuptools.Distribution({"name": "hbert", "ext_modules": extensions}))
    command.build_lib, command.build_temp = str(folder), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    return json.loads((library.parent / "build_info.json").read_text()), library


def words_of(compiler):
    return Path(f"{compiler}.log").read_text().splitlines()


def build(toolchain, folder):
    """Runs the ninja file; the library that it makes."""
    output = folder / "li b$.so"
    (folder / "isa").mkdir(parents=True)
    (folder / "build.ninja").write_text(toolchain.ninja_file(output))
    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    done = subprocess.run([*ninja, "-C", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return output


def test_any_folder_will_do(tree, tmp_path):
    module = tree.load()
    output = build(module.TOOLCHAIN, tmp_path / "build")
    assert output.exists()
    words = {*words_of(tree.compiler)}
    assert {str(tree.root / "csrc/cpu/op.cpp"), str(tree.root / "csrc/cpu/isa/op.cpp"), str(output)} <= words
    assert {f"{tree.torch}/include", f"-Wl,{tree.torch}/lib/libtorch.so"} <= words


def test_any_folder_will_do_for_cuda(tree, tmp_path):
    module = tree.load()
    output = build(module.CUDA_TOOLCHAIN, tmp_path / "build")
    assert output.exists()
    assert {str(tree.root / "csrc/cuda/binding.cpp"), f"{tree.torch}/include"} <= {*words_of(tree.compiler)}
    # nvcc hands it to a shell of its own.
    linked = {str(output), f'-Xlinker="{tree.torch}/lib/libc10.so"', str(tree.compiler)}
    assert {str(tree.root / "csrc/cuda/op.cu"), *linked} <= {*words_of(tree.nvcc)}


def test_the_newest_architecture_is_there_as_ptx(tree):
    tree.monkeypatch.setenv("HBERT_CUDA_ARCHS", "100, 90;80")
    module = tree.load()
    assert module.BUILD_INFO["cuda"]["architectures"] == ["80", "90", "100"]
    flags = module.CUDA_TOOLCHAIN.code_flags.split()
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize("names, refused", [("90a,80", "90a"), ("80,120", "120"), ("", "any GPU")])
def test_architectures_that_the_kernels_are_not_compiled_for(tree, names, refused):
    tree.monkeypatch.setenv("HBERT_CUDA_ARCHS", names)
    info = tree.load().BUILD_INFO["cuda"]
    assert info["built"] is False
    assert info["reason"] == f"{tree.nvcc} cannot compile the kernels for {refused}; allowed: 80, 90, 100"


def test_an_old_compiler_is_told_before_anything_is_compiled(tree):
    program(tree.compiler, WITHOUT_LEVELS)
    module = tree.load()
    assert module.TOOLCHAIN is None and module.CUDA_TOOLCHAIN is None
    assert module.BUILD_INFO["built"] is False
    assert "error: unrecognized command-line option '-mnew'" in module.BUILD_INFO["reason"]
    assert module.BUILD_INFO["fix"].startswith("install g++ >= 11 or clang++ >= 12")
    tree.monkeypatch.setenv("HBERT_BUILD", "1")
    with pytest.raises(SystemExit, match="HBERT_BUILD=1, but .* refuses what the kernels need: error: unrecognized"):
        tree.load()


@pytest.mark.parametrize(
    ("of_an_index", "command"),
    [
        (False, "pip install --force-reinstall --no-deps --editable ."),
        (True, "pip install --force-reinstall --no-deps --no-cache-dir --no-binary hbert hbert"),
    ],
)
def test_the_remedy_does_not_take_the_wheel_that_pip_kept(tree, of_an_index, command):
    if of_an_index:
        (tree.root / "PKG-INFO").touch()
    (tree.torch / "version.py").unlink()
    info = tree.load().BUILD_INFO
    assert info["reason"] == "torch is not installed here"
    assert info["fix"] == f"pip install 'torch>=2.10', then {command}"


def test_what_is_recorded_names_no_kernel_of_the_system(tree):
    info = tree.load().BUILD_INFO
    assert info["built"] is True and info["cuda"]["built"] is True
    assert info["platform"] == sysconfig.get_platform()
    assert platform.release() not in json.dumps(info)


def test_code_for_any_processor_is_that_whatever_the_flags(tree):
    """-march=native in CXXFLAGS comes before the -march of each level; -mavx2 would not be undone by it."""
    tree.monkeypatch.setenv("CXXFLAGS", "-march=native")
    module = tree.load()
    assert module.BUILD_INFO["flags"].endswith(" -march=native")
    if module.MACHINE == "x86_64":
        assert all(flags.startswith("-march=x86-64 ") for flags in module.LEVELS.values())
        assert "-DHBERT_SCALAR" in module.LEVELS["scalar"]


def test_the_scalar_level_refuses_wider_instructions():
    source = SETUP.parent / "csrc/cpu/isa/vec.h"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-DHBERT_SCALAR", "-D__AVX2__", str(source)]
    assert "the scalar level must not have AVX2" in subprocess.run(command, capture_output=True, text=True).stderr


def test_headers_without_the_stable_abi_are_told_before_anything_is_compiled(tree):
    tree.header.unlink()
    assert tree.load().BUILD_INFO["reason"] == f"the torch in {tree.torch} has no C++ headers"


def test_a_compilation_that_fails_leaves_pure_python(tree, tmp_path):
    program(tree.compiler, COMPILES_NOTHING)
    info, library = build_library(tree.load(), tmp_path / "built")
    assert (info["built"], info["reason"]) == (False, "compiling _cpu.so failed")
    assert info["cuda"]["reason"] == "the whole package is pure Python"
    assert not library.exists()
    assert str(tree.root / "csrc/cuda/op.cu") not in words_of(tree.nvcc)


def test_a_compilation_that_fails_is_an_error_where_it_was_asked_for(tree, tmp_path):
    program(tree.compiler, COMPILES_NOTHING)
    tree.monkeypatch.setenv("HBERT_BUILD", "1")
    with pytest.raises(SystemExit, match="compiling _cpu.so failed, see above; HBERT_BUILD=0 installs without it"):
        build_library(tree.load(), tmp_path / "built")


@pytest.mark.parametrize("options", ["", " -pthread", " -I include"])
def test_a_compiler_with_options_and_a_launcher(tree, options):
    tree.monkeypatch.setenv("CXX", f"env '{tree.compiler}'{options}")
    text = tree.load().CUDA_TOOLCHAIN.ninja_file(tree.root / "_cuda.so")
    assert f" -ccbin '{tree.compiler}' -std=c++17 " in text.replace("$$", "$")


def test_an_empty_compiler_is_none_that_was_named(tree):
    tree.monkeypatch.setenv("CXX", "")
    assert tree.load().TOOLCHAIN.compiler == f"'{tree.compiler}'"
