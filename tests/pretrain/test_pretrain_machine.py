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


def test_what_a_run_records_of_the_machine(monkeypatch):
    def revision(package, checkout):
        assert (package / "build_info.json").is_file() and (checkout / "hbert" / "pretrain").is_dir()
        return "0123456789ab"

    monkeypatch.setattr(machine, "measured_revision", revision)
    about = machine.describe(torch.device("cpu"))
    assert about["cpu_capability"] == hbert_kernels.cpu_capability() and about["device"] == "cpu"
    assert machine.software()["revision"] == "0123456789ab" and machine.software()["torch"] == torch.__version__
