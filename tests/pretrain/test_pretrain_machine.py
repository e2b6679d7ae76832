import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hbert_kernels
from hbert.pretrain import machine
from hbert.processor import ALLOWED, identity, label

ZEN_3 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
ARM = "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\nCPU revision\t: 1\n"


@pytest.mark.parametrize(
    ("about", "native"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_bf16 avx512_fp16", False),  # AMX is hidden
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_bf16", True),  # older than AMX
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f avx512_bf16 avx512_fp16", True),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm", True),
        ("processor\t: 0\nFeatures\t: fp asimd", False),
        ("", False),
    ],
)
def test_bfloat16_is_native_where_it_is_fast(about, native, monkeypatch):
    monkeypatch.setattr(machine, "_read", lambda path: about)
    assert machine.native_bf16(torch.device("cpu")) == native
    assert machine.resolve_dtype("auto", torch.device("cpu")) == ("bf16" if native else "fp32")
    assert machine.resolve_dtype("bf16", torch.device("cpu")) == "bf16"


def test_what_a_run_records_of_the_machine(monkeypatch):
    def revision(package, checkout):
        assert (package / "build_info.json").is_file() and (checkout / "hbert" / "pretrain").is_dir()
        return "0123456789ab"

    monkeypatch.setattr(machine, "measured_revision", revision)
    about = machine.describe(torch.device("cpu"))
    assert about["cpu_capability"] == hbert_kernels.cpu_capability() and about["device"] == "cpu"
    assert machine.software()["revision"] == "0123456789ab" and machine.software()["torch"] == torch.__version__


def test_one_name_of_two_generations_is_told_apart_by_the_model(monkeypatch):
    zen_5 = ZEN_3.replace(": 25", ": 26").replace("model\t\t: 1", "model\t\t: 2")
    assert identity(ZEN_3 + zen_5) == {"cpu": "AMD EPYC", "cpu_model": "25/1/1"}  # of the first core
    assert label(identity(zen_5)) == "AMD EPYC (26/2/1)"
    monkeypatch.setattr(machine, "_read", lambda path: ZEN_3)
    about = machine.describe(torch.device("cpu"))
    assert (about["cpu"], about["cpu_model"]) == ("AMD EPYC", "25/1/1")


def test_arm_has_other_fields_and_some_systems_have_none():
    assert identity(ARM)["cpu_model"] == "0x41/0xd40/0x1/1"
    assert list(identity("")) == ["cpu"] and label(identity("")) == identity("")["cpu"]


def test_cores_are_those_of_the_start_whatever_openmp_has_done_to_the_thread(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(len(ALLOWED) + 1)), raising=False)
    assert machine.describe(torch.device("cpu"))["cores"] == len(ALLOWED)


@pytest.mark.parametrize("package", ["hbert", "bench"])
def test_the_cores_are_looked_up_before_torch_is_loaded(package):
    code = f"import {package}, sys; print('hbert.processor' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
