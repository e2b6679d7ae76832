"""What the selftest runs on which device, and what it tells: on stand-ins for a GPU, there being none."""

import math

import pytest
import torch

from hbert_kernels import _dispatch, _library, selftest
from hbert_kernels._accuracy import Result
from hbert_kernels._selftest_cases import Case, cases

FLOATS = {torch.float32, torch.bfloat16, torch.float64}


def dtypes(device):
    found = {}
    for case in cases(device):
        found.setdefault(case.op, set()).update(t.dtype for t in case.inputs)
    return found


def test_float16_is_checked_where_there_may_be_kernels_for_it():
    on_cpu, elsewhere = dtypes("cpu"), dtypes("meta")
    assert set(on_cpu) == {*_dispatch.OPS, *_dispatch.INFERENCE_OPS}
    assert set(elsewhere) == set(_dispatch.OPS)
    for op, found in on_cpu.items():
        assert found <= FLOATS and (op not in elsewhere or elsewhere[op] == found | {torch.float16})


def test_attention_is_refused_by_its_heads_too(monkeypatch):
    asked = []
    monkeypatch.setattr(_dispatch, "refusal", lambda op, backend, *given: asked.append(given))
    for case in cases("meta"):
        if case.op == "attention":
            case.refusal("cuda")
    assert {given[1:] for given in asked} == {(0.0, heads) for heads in (3, 4, 5, 8)}


@pytest.fixture
def gpu(monkeypatch):
    """A torch that tells of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "cuda_load_failure", lambda: None)
    monkeypatch.setattr(_library, "cuda_architectures", lambda: ["80", "90"])


def case(op, label="7x5 float16", refused_by=("cpp",), reason="runs on the CPU"):
    class Stub(Case):
        def refusal(self, backend):
            return reason if backend in refused_by else None

    return Stub(op, label, lambda: None, [])


def run(monkeypatch, capsys, made, outcomes):
    """Exit code and lines of the selftest on these cases; `outcomes` by backend, an exception is raised."""

    def compare(function, inputs, backend):
        if isinstance(outcomes[backend], Exception):
            raise outcomes[backend]
        return outcomes[backend]

    monkeypatch.setattr(selftest, "cases", lambda device: iter(made))
    monkeypatch.setattr(selftest, "compare", compare)
    code = selftest.main(["--device", "cuda"])
    return code, capsys.readouterr().out.splitlines()


GOOD, BAD = Result("output 0", 1.0, 4.0), Result("gradient 1", 8.0, 4.0)


def test_a_gpu_owner_can_paste_what_is_printed(gpu, monkeypatch, capsys):
    made = [case("layer_norm"), case("attention", refused_by=("cpp", "triton"), reason="no kernel is written")]
    code, lines = run(monkeypatch, capsys, made, {"triton": [GOOD], "cuda": [GOOD, Result("output 1", 3.0, 4.0)]})
    assert code == 0
    assert lines[0].startswith(f"torch {torch.__version__}, device cuda")
    assert lines[1].startswith("A GPU, compute capability 9.0, CUDA 13.0, triton ")
    assert lines[2] == "compiled CUDA kernels: loaded, compiled for 80, 90"
    assert lines[3:] == [
        "layer_norm               triton    1 cases, 0 failed, worst error/bound 0.25",
        "layer_norm               cuda      1 cases, 0 failed, worst error/bound 0.75",
        "attention                cuda      1 cases, 0 failed, worst error/bound 0.75",
        "attention                triton not run: no kernel is written",
    ]


def test_a_kernel_that_raises_has_failed_and_the_others_are_checked(gpu, monkeypatch, capsys):
    outcomes = {"triton": RuntimeError("out of resources: shared memory\nmore"), "cuda": [GOOD]}
    code, lines = run(monkeypatch, capsys, [case("layer_norm")], outcomes)
    assert code == 1
    assert lines[3] == "layer_norm               triton    1 cases, 1 failed, worst error/bound inf"
    assert lines[4].startswith("  FAILED 7x5 float16: raised RuntimeError: out of resources: shared memory error")
    assert "cuda      1 cases, 0 failed" in lines[5]


@pytest.mark.parametrize("wrong, ratio", [(BAD, "2.00"), (Result("output 0", math.nan, 4.0), "inf")])
def test_many_failures_are_counted_and_the_first_are_told(wrong, ratio, gpu, monkeypatch, capsys):
    made = [case("layer_norm", refused_by=("cpp", "triton")) for _ in range(9)]
    code, lines = run(monkeypatch, capsys, made, {"cuda": [GOOD, wrong]})
    assert code == 1 and f"9 cases, 9 failed, worst error/bound {ratio}" in lines[3]
    assert sum("FAILED" in line for line in lines) == 5 and "  and 4 more" in lines


def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selftest.main(["--device", "cuda"]) == 1
    assert capsys.readouterr().out == "selftest: this torch sees no CUDA device\n"
