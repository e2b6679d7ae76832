"""The command line: what it refuses, what it plans, and how it ends."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_results import measured

from bench import machine, run, session
from bench.harness import FEWEST, Effort, Failure
from bench.suites import SUITES

RUN = Path(run.__file__)


@pytest.mark.parametrize("arguments, message", [
    (["--suite", "speed"], "unknown suite 'speed'; allowed: latency, throughput, kernels"),
    (["--models", "hbert-v1,hbert-v9"], "unknown model 'hbert-v9'; allowed: hbert-v1, hbert-v2, hbert-v1c"),
    (["--peers", "ort"], "unknown peer 'ort'; allowed: hf, hf-compile"),
    (["--dtype", "fp16"], "unknown dtype 'fp16'; allowed: fp32, bf16"),
    (["--shapes", "8by128"], "'8by128' is not a shape; write BATCHxTOKENS, e.g. 8x128"),
    (["--shapes", "1x128,0x128"], "'0x128': batch and tokens must be at least 1"),
    (["--shapes", "1x513"], "--shapes: the suite latency takes at most 512 tokens, got 513"),
    (["--ops", "softmax"], "unknown op 'softmax'; allowed: layer_norm, activation_layer_norm"),
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


def planned(*arguments):
    return run.plan(run.parser().parse_args(arguments))


def test_the_default_is_the_documented_one():
    latency, throughput = planned()
    assert latency.peers == throughput.peers == ("hf", "hbert-v1", "hbert-v2")
    assert [(case.name, case.dtype) for case in latency.cases] == [
        (shape, dtype) for dtype in ("fp32", "bf16") for shape in ("1x128", "8x128", "1x512")]
    assert [(case.name, case.dtype, case.work) for case in throughput.cases] == [("8x128", "bf16", 1024)]
    assert all(case.params == {"size": "base"} for case in latency.cases)


def test_flags_override_the_defaults_and_those_of_quick():
    (only,) = planned("--suite", "throughput", "--quick", "--shapes", "2x37,2x37", "--dtype", "fp32",
                      "--models", "hbert-additive-c", "--peers", "hf-compile,hf")
    assert only.peers == ("hf-compile", "hf", "hbert-additive-c")
    assert [(case.name, case.dtype, case.batch, case.seq) for case in only.cases] == [("2x37", "fp32", 2, 37)]


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
    def measure(plans, cpus, report, save_report):
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
    monkeypatch.setattr(session, "run", lambda plans, cpus, report, save: report.failures.append(failure))
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
