"""The command line: what it refuses, what it plans, and how it ends."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_results import measured

from bench import machine, run, session
from bench.harness import FEWEST, MEMORY, TIME, Effort, Failure
from bench.suites import SUITES

RUN = Path(run.__file__)


@pytest.mark.parametrize("arguments, message", [
    (["--suite", "speed"], "unknown suite 'speed'; allowed: latency, varlen, throughput, kernels"),
    (["--models", "hbert-v1,hbert-v9"], "unknown model 'hbert-v9'; allowed: hbert-v1, hbert-v2, hbert-v1c"),
    (["--peers", "ort"], "unknown peer 'ort'; allowed: hf, hf-compile, hf-fp32"),
    (["--dtype", "fp16"], "unknown dtype 'fp16'; allowed: fp32, bf16"),
    (["--shapes", "8by128"], "'8by128' is not a shape; write BATCHxTOKENS, e.g. 8x128"),
    (["--shapes", "1x128,0x128"], "'0x128': batch and tokens must be at least 1"),
    (["--shapes", "1x513"], "--shapes: the suite latency takes at most 512 tokens, got 513"),
    (["--ops", "softmax"], "unknown op 'softmax'; allowed: layer_norm, activation_layer_norm"),
    (["--size", "4x128"], "unknown size '4x128'; allowed: base, 4x256, tiny"),
    (["--suite", "kernels", "--size", "4x256"], "--size: the suite kernels measures ops"),
    (["--suite", "kernels", "--heap", "ours"], "--heap ours: all peers of the suite kernels share a process"),
    (["--heap", "some"], "invalid choice: 'some'"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
    (["--ops", "layer_norm"], "--ops: the suite latency measures models"),
    (["--suite", "kernels", "--peers", "hf"], "--peers: the suite kernels has no hf; allowed: eager, compile, sdpa"),
    (["--models", "hbert"], "--models: the suite latency has no hbert; allowed: hbert-v1"),
    (["--threads", "0"], f"'0': allowed are 1 to {len(machine.cores())}"),
    (["--threads", "1000000"], f"allowed are 1 to {len(machine.cores())}"),
    (["--min-time", "-1"], "'-1' is not a number of seconds above 0"),
    (["--min-time", "nan"], "'nan' is not a number of seconds above 0"),
])
def test_bad_flags_say_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_result_folder_that_cannot_be_written_stops_the_run_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(session, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        run.main(["--out", str(tmp_path / "file")])
    assert stopped.value.code == 2 and "cannot write results there" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """Of a processor with bf16 products; a test may change them."""
    found = ["avx2", "avx512f"]
    monkeypatch.setattr(machine, "vector_flags", lambda: found)
    return found


def planned(*arguments):
    return run.plan(run.parser().parse_args(arguments))


def test_the_default_is_the_documented_one():
    latency, throughput = planned()
    assert latency.peers == ("hf", "hbert-v1", "hbert-v2")
    assert throughput.peers == (*latency.peers, "floor-hbert-v1", "floor-hbert-v2")
    assert [(case.name, case.dtype) for case in latency.cases] == [
        (f"base/{shape}", dtype) for dtype in ("fp32", "bf16") for shape in ("1x128", "8x128", "1x512")]
    assert [(case.name, case.dtype, case.work) for case in throughput.cases] == [("base/8x128", "bf16", 1024)]
    assert all(case.params == {"size": "base"} for case in latency.cases)
    assert {case.measures for case in latency.cases} == {(TIME,)}


def test_each_size_has_shapes_of_its_own():
    (only,) = planned("--suite", "throughput", "--size", "4x256,base")
    sizes = {case.name: case.params["size"] for case in only.cases}
    assert sizes == {"4x256/32x128": "4x256", "base/8x128": "base"}


@pytest.mark.parametrize("counted", [True, False])
def test_memory_of_training_is_measured_where_the_system_counts_it(counted, monkeypatch):
    monkeypatch.setattr(machine, "counts_peak_memory", lambda: counted)
    (only,) = planned("--suite", "throughput")
    assert only.cases[0].measures == ((TIME, MEMORY) if counted else (TIME,))


def test_without_bf16_products_the_default_is_less_of_fp32(flags):
    flags.remove("avx512f")
    latency, throughput = planned()
    assert [(case.name, case.dtype) for case in latency.cases] == [("base/1x128", "fp32")]
    assert [(case.name, case.dtype) for case in throughput.cases] == [("base/2x128", "fp32")]
    assert latency.effort == SUITES["latency"].effort
    (kernels,) = planned("--suite", "kernels")
    assert {case.dtype for case in kernels.cases} == {"fp32"} and len({case.batch for case in kernels.cases}) > 1
    (asked,) = planned("--suite", "throughput", "--dtype", "bf16")
    assert [(case.name, case.dtype) for case in asked.cases] == [("base/8x128", "bf16")]
    (on_gpu,) = planned("--suite", "throughput", "--device", "cuda")
    assert [(case.name, case.dtype) for case in on_gpu.cases] == [("base/8x128", "bf16")]


def test_the_header_says_what_was_left_out(flags):
    options = run.parser().parse_args([])
    assert "bf16" not in run.about(options, [0], [])
    flags.remove("avx512f")
    assert "fp32 instead" in run.about(options, [0], [])["bf16"]


def test_flags_override_the_defaults_and_those_of_quick():
    (only,) = planned("--suite", "throughput", "--quick", "--shapes", "2x37,2x37", "--dtype", "fp32",
                      "--models", "hbert-additive-c", "--peers", "hf-compile,hf")
    assert only.peers == ("hf-compile", "hf", "hbert-additive-c", "floor-hbert-additive-c")
    assert [(case.name, case.dtype, case.batch, case.seq) for case in only.cases] == [("base/2x37", "fp32", 2, 37)]


def test_quick_is_less_of_the_same():
    assert sum(len(plan.cases) for plan in planned("--quick")) < sum(len(plan.cases) for plan in planned())
    for suite in SUITES:
        (quick,), (full,) = ({p.effort for p in planned("--suite", suite, *flags)} for flags in (["--quick"], []))
        assert quick.min_rounds >= FEWEST and quick.min_time < full.min_time
        (given,) = planned("--suite", suite, "--quick", "--min-time", "7")
        assert given.effort == Effort(7, quick.min_rounds)


def results(folder):
    (table,), (stored,) = folder.glob("*.csv"), folder.glob("*.json")
    return list(csv.DictReader(table.open())), json.loads(stored.read_text())


@pytest.mark.parametrize("ends, code", [(None, 0), (KeyboardInterrupt, 130)])
def test_what_is_complete_is_written(tmp_path, monkeypatch, capsys, ends, code):
    def measure(plans, setup, report, save_report):
        report.add(measured(), ("hbert-v1",), ("hf",))
        if ends:
            raise ends
    monkeypatch.setattr(session, "run", measure)
    assert run.main(["--out", str(tmp_path), "--threads", "1"]) == code
    rows, stored = results(tmp_path)
    assert [row["candidate"] for row in rows] == ["hf", "hbert-v1"] and rows[0]["threads"] == "1"
    assert stored["about"]["command"] == f"python bench/run.py --out {tmp_path} --threads 1"
    assert ("interrupted" in capsys.readouterr().out) is bool(ends)


def test_a_failure_makes_the_exit_code_1(tmp_path, monkeypatch, capsys):
    failure = Failure("latency", "1x128", "fp32", "hf", "worker died")
    monkeypatch.setattr(session, "run", lambda plans, setup, report, save: report.failures.append(failure))
    assert run.main(["--out", str(tmp_path)]) == 1
    assert "failed latency 1x128 fp32, hf: worker died" in capsys.readouterr().out


def test_it_runs_as_a_script_from_any_folder(tmp_path):
    command = [sys.executable, str(RUN), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for suite in SUITES:
        assert suite in done.stdout


def test_the_revision_says_dirty(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    assert machine.git_revision(tmp_path) == "unknown"
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = machine.git_revision(tmp_path)
    assert len(clean) == 12
    (tmp_path / "b").write_text("2")
    assert machine.git_revision(tmp_path) == f"{clean}-dirty"
