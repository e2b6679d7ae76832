import subprocess

import pytest
import torch

import hbert_kernels
from hbert.pretrain import machine


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


def git(folder, *words):
    names = ["-c", "user.name=somebody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *names, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_revision_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "build_info", lambda: {"git": "0123456789ab"})
    assert machine._revision(tmp_path) == "0123456789ab"  # installed
    git(tmp_path, "init")
    assert machine._revision(tmp_path) == "0123456789ab"  # no commit
    (tmp_path / "file").touch()
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert machine._revision(tmp_path) == revision
    (tmp_path / "file").write_text("changed")
    assert machine._revision(tmp_path) == f"{revision}-dirty"
    # Inside a checkout of something else.
    (tmp_path / "site-packages").mkdir()
    assert machine._revision(tmp_path / "site-packages") == "0123456789ab"
    monkeypatch.setattr(machine, "build_info", lambda: {"built": False})
    assert machine._revision(tmp_path / "site-packages") == "unknown"


def test_what_a_run_records_of_the_machine(monkeypatch):
    monkeypatch.setattr(machine, "_revision", lambda checkout: str((checkout / "hbert" / "pretrain").is_dir()))
    about = machine.describe(torch.device("cpu"))
    assert about["cpu_capability"] == hbert_kernels.cpu_capability() and about["device"] == "cpu"
    assert machine.software()["revision"] == "True" and machine.software()["torch"] == torch.__version__
