"""What the command line plans: suites, sizes, shapes, peers, and who is left out."""

import json
import re

import pytest
from bench_results import measured

from bench import engines, machine, run, session
from bench.harness import MEMORY, TIME
from bench.suites import SUITES


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch):
    """A processor with products of bfloat16."""
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: True)


@pytest.fixture
def without_bf16(with_bf16, monkeypatch):
    """A processor whose products of bfloat16 are slower than those of float32."""
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: False)


def planned(*arguments):
    return run.plan(run.parser().parse_args(arguments))


OURS = ("hbert-v1+optimize", "hbert-v2+optimize", "bert+optimize")
FLOORS = ("floor-hbert-v1", "floor-hbert-v2", "floor-bert")


def test_the_default_is_the_documented_one():
    latency, throughput = planned()
    assert latency.peers == ("hf", "ort-fp32", "ort-int8", "ov-fp32", "ov-bf16", "ov-int8", *OURS, *FLOORS)
    assert {case.dtype: case.peers for case in latency.cases} == {
        "fp32": ("hf", "ort-fp32", "ov-fp32", *OURS, *FLOORS),
        "bf16": ("hf", "ov-bf16", *OURS, *FLOORS),
    }
    trained = ("hbert-v1", "hbert-vanilla")
    theirs = ("hf", "hf-compile")
    floors = tuple(f"floor-{name}" for name in trained)
    assert throughput.peers == (*theirs, *trained, *floors)
    assert [(case.name, case.dtype) for case in latency.cases] == [
        (f"base/{shape}", dtype) for dtype in ("fp32", "bf16") for shape in ("1x128", "8x128", "1x512")
    ]
    assert [(case.name, case.dtype, case.work) for case in throughput.cases] == [
        ("4x256/32x128", "bf16", 4096),
        ("base/8x128", "bf16", 1024),
    ]
    assert [case.peers for case in throughput.cases] == [
        (*theirs, *trained, *floors),
        ("hf", "hf-compile", "hbert-v1", "floor-hbert-v1"),
    ]
    assert all(case.params == {"size": "base"} for case in latency.cases)


def test_who_is_named_takes_part_at_every_size():
    flags = ["--suite", "throughput", "--size", "base"]
    (named,) = planned(*flags, "--models", "hbert-v2,hbert-vanilla", "--peers", "hf-fp32")
    assert named.cases[0].peers[:3] == ("hf-fp32", "hbert-v2", "hbert-vanilla")


def test_each_size_has_shapes_of_its_own():
    (only,) = planned("--suite", "throughput", "--size", "4x256,base")
    sizes = {case.name: case.params["size"] for case in only.cases}
    assert sizes == {"4x256/32x128": "4x256", "base/8x128": "base"}


def test_peers_of_another_dtype_take_part_where_they_are_asked_for():
    (only,) = planned(
        "--suite",
        "latency",
        "--dtype",
        "bf16,int8",
        "--peers",
        "hf,hf-bf16,ov-int8",
        "--models",
        "hbert-v1,bert+optimize",
        "--shapes",
        "1x7",
    )
    theirs = ("hf-bf16", "ov-int8")
    assert {case.dtype: case.peers for case in only.cases} == {
        "bf16": ("hf", *theirs, "hbert-v1", "bert+optimize", "floor-hbert-v1", "floor-bert"),
        "int8": (*theirs, "bert+optimize", "floor-bert"),
    }


def test_on_a_gpu_the_plain_models_stand_for_the_optimized_ones():
    (only,) = planned("--suite", "latency", "--device", "cuda")
    assert only.peers == ("hf", "hbert-v1", "hbert-v2", "floor-hbert-v1", "floor-hbert-v2")


def test_each_padded_batch_is_also_measured_in_buckets():
    (only,) = planned("--suite", "varlen", "--dtype", "fp32", "--shapes", "16x128,2x9,1x9")
    assert [(case.name, case.params.get("buckets")) for case in only.cases] == [
        ("base/16x128", None),
        ("base/16x128/buckets", 4),
        ("base/2x9", None),
        ("base/2x9/buckets", 2),
        ("base/1x9", None),
    ]
    assert len({case.work for case in only.cases if case.batch == 16}) == 1


def checkpoint(folder, kind):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "max_position_embeddings": 64}))
    return ["--checkpoint", str(folder), "--dtype", "fp32", "--shapes", "2x64"]


def planned_of(arguments):
    options = run.parser().parse_args(arguments)
    options.checkpoint = run.checkpoint.read(options.checkpoint)
    return run.plan(options)


@pytest.mark.parametrize(
    "kind, ours, theirs",
    [("bert", ("bert+optimize",), ("hf", "ort-fp32", "ov-fp32")), ("hbert", ("hbert+optimize",), ("hbert",))],
)
def test_a_checkpoint_takes_the_place_of_the_sizes(kind, ours, theirs, tmp_path):
    latency, varlen = planned_of(checkpoint(tmp_path / "mine", kind))
    assert [(case.name, case.params["size"]) for case in latency.cases] == [("mine/2x64", str(tmp_path / "mine"))]
    assert [case.name for case in varlen.cases] == ["mine/2x64", "mine/2x64/buckets"]
    assert latency.cases[0].peers == (*theirs, *ours, f"floor-{kind}")


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--size", "tiny"], "--size: a checkpoint has its own"),
        (["--shapes", "1x65"], "the checkpoint takes at most 64 tokens, got 65"),
        (["--suite", "throughput"], "--checkpoint: the suite throughput takes none"),
        (["--models", "hbert-v1"], "on a checkpoint of a bert has no hbert-v1; allowed: bert+optimize, bert+patch"),
    ],
)
def test_what_a_checkpoint_cannot_have(more, reason, tmp_path):
    with pytest.raises(ValueError, match=re.escape(reason)):
        planned_of([*checkpoint(tmp_path / "mine", "bert"), *more])


def test_a_peer_that_is_not_installed_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda package: None if package in ("openvino", "nncf") else "found")
    peers = ["--peers", "hf,ov-fp32,ov-int8,ort-fp32"]
    kept, left_out = run.installed(planned("--suite", "latency", *peers, "--dtype", "fp32,int8"))
    assert kept[0].baselines == ("hf", "ort-fp32") and "hbert-v1+optimize" in kept[0].peers
    assert {one.peer: one.reason for one in left_out} == {
        "ov-fp32": "openvino is not installed: pip install openvino",
        "ov-int8": "openvino and nncf are not installed: pip install openvino nncf",
    }


def test_a_peer_without_a_case_need_not_be_installed(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda package: None if package == "nncf" else "found")
    assert run.installed(planned())[1] == []
    assert [one.peer for one in run.installed(planned("--suite", "latency", "--dtype", "int8"))[1]] == ["ov-int8"]


@pytest.mark.parametrize("lacking", ["compiler", "headers", "nothing"])
def test_compiled_peers_need_what_torch_makes_code_with(lacking, monkeypatch, tmp_path):
    monkeypatch.setattr(engines.shutil, "which", lambda name: None if lacking == "compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(engines.sysconfig, "get_path", lambda name: str(tmp_path))
    if lacking != "headers":
        (tmp_path / "Python.h").touch()
    plans = planned("--suite", "throughput", "--peers", "hf,hf-compile")
    plans += planned("--suite", "kernels", "--peers", "eager,compile")
    kept, left_out = run.installed(plans)
    found = [("hf", "hf-compile"), ("eager", "compile")] if lacking == "nothing" else [("hf",), ("eager",)]
    assert [one.baselines for one in kept] == found
    assert all(one.reason.startswith("torch.compile needs a C++ compiler") for one in left_out)


def test_a_run_tells_who_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "find_spec", lambda package: None if package == "openvino" else "found")
    monkeypatch.setattr(
        session, "run", lambda plans, setup, report, save: report.add(measured(), ("hbert-v1",), ("hf",))
    )
    flags = ["--suite", "latency", "--peers", "hf,ov-fp32", "--out", str(tmp_path), "--threads", "1"]
    assert run.main(flags) == 0
    line = "openvino is not installed: pip install openvino"
    assert f"left out latency, ov-fp32: {line}" in capsys.readouterr().out
    (stored,) = tmp_path.glob("*.json")
    told = {"suite": "latency", "case": "", "dtype": "", "peer": "ov-fp32", "reason": line}
    assert json.loads(stored.read_text())["left_out"] == [told]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("suite", ["latency", "varlen", "throughput"])
def test_memory_is_measured_where_the_system_counts_it(suite, counted, monkeypatch):
    monkeypatch.setattr(machine, "counts_peak_memory", lambda: counted)
    (only,) = planned("--suite", suite)
    assert only.cases[0].measures == ((TIME, MEMORY) if counted else (TIME,))


@pytest.mark.usefixtures("without_bf16")
def test_without_bf16_products_the_default_is_less_of_fp32():
    latency, throughput = planned()
    assert [(case.name, case.dtype) for case in latency.cases] == [("base/1x128", "fp32")]
    assert [(case.name, case.dtype) for case in throughput.cases] == [("4x256/8x128", "fp32"), ("base/2x128", "fp32")]
    assert latency.min_time == SUITES["latency"].min_time
    (kernels,) = planned("--suite", "kernels")
    assert {case.dtype for case in kernels.cases} == {"fp32"} and len({case.batch for case in kernels.cases}) > 1
    (asked,) = planned("--suite", "throughput", "--dtype", "bf16")
    in_full = [("4x256/32x128", "bf16"), ("base/8x128", "bf16")]
    assert [(case.name, case.dtype) for case in asked.cases] == in_full
    (on_gpu,) = planned("--suite", "throughput", "--device", "cuda")
    assert [(case.name, case.dtype) for case in on_gpu.cases] == in_full


def test_the_header_says_nothing_of_bf16_where_it_is_measured():
    assert "bf16" not in run.about(run.parser().parse_args([]), [0], [])


@pytest.mark.usefixtures("without_bf16")
def test_the_header_says_what_was_left_out():
    options = run.parser().parse_args([])
    assert "fp32 instead" in run.about(options, [0], [])["bf16"]


def test_flags_override_the_defaults_and_those_of_quick():
    (only,) = planned(
        "--suite",
        "throughput",
        "--quick",
        "--shapes",
        "2x37,2x37",
        "--dtype",
        "fp32",
        "--models",
        "hbert-additive-c",
        "--peers",
        "hf-compile,hf",
    )
    assert only.peers == ("hf-compile", "hf", "hbert-additive-c", "floor-hbert-additive-c")
    assert [(case.name, case.dtype, case.batch, case.seq) for case in only.cases] == [("4x256/2x37", "fp32", 2, 37)]


def test_quick_is_less_of_the_same():
    assert sum(len(plan.cases) for plan in planned("--quick")) < sum(len(plan.cases) for plan in planned())
    (trained,) = planned("--suite", "throughput", "--quick")
    assert [case.name for case in trained.cases] == ["4x256/8x128"]
    for suite in SUITES:
        (quick,), (full,) = ({p.min_time for p in planned("--suite", suite, *flags)} for flags in (["--quick"], []))
        assert quick < full
        (given,) = planned("--suite", suite, "--quick", "--min-time", "7")
        assert given.min_time == 7
