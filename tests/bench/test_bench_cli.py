"""The command line: what it refuses, and how it ends."""

import csv
import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench_results import SECONDS, measured

import bench.report
from bench import compare, machine, run, session
from bench.harness import Failure
from bench.report import Report, save
from bench.suites import SUITES
from hbert.revision import git_revision, measured_revision

RUN = Path(run.__file__)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "speed"], "unknown suite 'speed'; allowed: latency, varlen, throughput, kernels"),
        (["--models", "hbert-v1,hbert-v9"], "unknown model 'hbert-v9'; allowed: hbert-v1, hbert-v2, hbert-v1c"),
        (["--peers", "ort"], "unknown peer 'ort'; allowed: hf, hf-compile, hf-fp32"),
        (["--dtype", "fp16"], "unknown dtype 'fp16'; allowed: fp32, bf16, int8"),
        (["--suite", "throughput", "--dtype", "int8"], "--dtype: the suite throughput has no int8"),
        (["--suite", "latency", "--dtype", "int8", "--models", "hbert-v1"], "--dtype int8: none of hbert-v1 has it"),
        (["--suite", "latency", "--models", "hbert+optimize"], "has no hbert+optimize (of a --checkpoint); allowed"),
        (["--suite", "throughput", "--peers", "ov-fp32"], "has no ov-fp32; allowed: hf, hf-compile, hf-fp32"),
        (["--fail-if-slower", "5%"], "--fail-if-slower: than what? name an earlier run by --compare"),
        (["--compare", "x.csv", "--fail-if-slower", "fast"], "'fast' is not a percentage above 0, such as 5%"),
        (["--compare", "/no/such.csv"], "--compare: cannot read /no/such.csv: [Errno 2]"),
        (["--checkpoint", "/no/such"], "--checkpoint /no/such: no checkpoint of an encoder: FileNotFoundError"),
        (["--shapes", "8by128"], "'8by128' is not a shape; write BATCHxTOKENS, e.g. 8x128"),
        (["--shapes", "1x128,0x128"], "'0x128': batch and tokens must be at least 1"),
        (["--shapes", "1x4097"], "--shapes: the suite latency takes at most 4096 tokens, got 4097"),
        (["--suite", "throughput", "--shapes", "1x513"], "the suite throughput takes at most 512 tokens, got 513"),
        (["--ops", "softmax"], "unknown op 'softmax'; allowed: layer_norm, activation_layer_norm"),
        (["--size", "4x128"], "unknown size '4x128'; allowed: base, 4x256, tiny"),
        (["--suite", "kernels", "--size", "4x256"], "--size: the suite kernels measures ops"),
        (["--suite", "kernels", "--heap", "ours"], "--heap ours: all peers of the suite kernels share a process"),
        (["--heap", "some"], "invalid choice: 'some'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--ops", "layer_norm"], "--ops: the suite latency measures models"),
        (
            ["--suite", "kernels", "--peers", "hf"],
            "--peers: the suite kernels has no hf; allowed: eager, compile, sdpa",
        ),
        (["--models", "hbert"], "--models: the suite latency has no hbert (of a --checkpoint); allowed: hbert-v1"),
        (["--threads", "0"], f"'0': allowed are 1 to {len(machine.cores())}"),
        (["--threads", "1000000"], f"allowed are 1 to {len(machine.cores())}"),
        (["--min-time", "-1"], "'-1' is not a number of seconds above 0"),
        (["--min-time", "nan"], "'nan' is not a number of seconds above 0"),
    ],
)
def test_bad_flags_say_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_help_tells_the_names_of_the_suite_kernels_apart(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    told = run.parser().format_help()
    assert " hbert+optimize; for the suite kernels: hbert, hbert-direct, hbert-key-free\n" in told
    assert " hbert; for the suite kernels: eager, compile, sdpa, onednn\n" in told


def test_a_result_folder_that_cannot_be_written_stops_the_run_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(session, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        run.main(["--out", str(tmp_path / "file")])
    assert stopped.value.code == 2 and "cannot write results there" in capsys.readouterr().err


def results(folder):
    (table,), (stored,) = folder.glob("*.csv"), folder.glob("*.json")
    return list(csv.DictReader(table.open())), json.loads(stored.read_text())


@pytest.mark.parametrize("ends, code", [(None, 0), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_what_is_complete_is_written(tmp_path, monkeypatch, capsys, ends, code):
    def measure(plans, setup, report, save_report):
        report.add(measured(), ("hbert-v1",), ("hf",))
        if ends:
            signal.raise_signal(ends)

    monkeypatch.setattr(session, "run", measure)
    assert run.main(["--out", str(tmp_path), "--threads", "1"]) == code
    rows, stored = results(tmp_path)
    assert [row["candidate"] for row in rows] == ["hf", "hbert-v1"] and rows[0]["threads"] == "1"
    assert stored["about"]["command"] == f"python bench/run.py --out {tmp_path} --threads 1"
    assert ("interrupted" in capsys.readouterr().out) is bool(ends)


def test_a_full_disk_leaves_the_table_and_makes_the_exit_code_1(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "a file")

    def measure(plans, setup, report, save_report):
        report.add(measured(), ("hbert-v1",), ("hf",))
        save_report()

    monkeypatch.setattr(session, "run", measure)
    monkeypatch.setattr(run, "save", full)
    assert run.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "backend of hbert-v1" in said
    for beginning in ("failed, ", "failed: the results were not written: "):
        assert f"{beginning}[Errno 28] No space left on device: 'a file'" in said


def test_what_is_complete_is_written_where_the_run_cannot_go_on(tmp_path, monkeypatch):
    def measure(plans, setup, report, save_report):
        report.add(measured(), ("hbert-v1",), ("hf",))
        raise OSError("no temporary files")

    monkeypatch.setattr(session, "run", measure)
    assert run.main(["--out", str(tmp_path)]) == 1
    assert len(results(tmp_path)[0]) == 2


def test_a_failure_makes_the_exit_code_1(tmp_path, monkeypatch, capsys):
    failure = Failure("latency", "1x128", "fp32", "hf", "worker died")
    monkeypatch.setattr(session, "run", lambda plans, setup, report, save: report.failures.append(failure))
    assert run.main(["--out", str(tmp_path)]) == 1
    assert "failed latency 1x128 fp32, hf: worker died" in capsys.readouterr().out


def earlier(folder, **changed):
    """The CSV of an earlier run with the rows of `measured`, in which a call took `times` as long."""
    folder.mkdir()
    report = Report({**run.about(run.parser().parse_args([]), [0], []), "device": "cpu", **changed})
    report.add(measured(), ("hbert-v1",), ("hf",))
    return save(report, folder, "old")[0]


@pytest.fixture
def same_run(monkeypatch):
    """A run of twice the seconds of `measured`; noise=True: on a busy machine."""

    def prepare(noise=False):
        def measure(plans, setup, report, save_report):
            slow = {peer: [tuple(2 * s for s in calls) for calls in rounds] for peer, rounds in SECONDS.items()}
            report.add(measured(calls=slow), ("hbert-v1",), ("hf",))
            if noise:
                report.canary += [0.001, 0.002] * 9

        monkeypatch.setattr(session, "run", measure)
        monkeypatch.setattr(compare, "kernels", lambda: ("avx2", True))

    return prepare


@pytest.mark.parametrize("more, code", [([], 0), (["--fail-if-slower", "5%"], 3), (["--fail-if-slower", "150%"], 0)])
def test_a_slower_candidate_makes_the_exit_code_3_where_that_is_asked_for(more, code, tmp_path, same_run, capsys):
    same_run()
    old = earlier(tmp_path / "old")
    assert run.main(["--out", str(tmp_path / "new"), "--compare", str(old), *more]) == code
    said = capsys.readouterr().out
    assert "+100.0%" in said and (" slower" in said) is (code == 3 or not more)


@pytest.mark.parametrize("more, code", [([], 0), (["--fail-if-slower", "5%"], 1)])
def test_nothing_compared_is_no_pass(more, code, tmp_path, monkeypatch, same_run, capsys):
    same_run()
    old = earlier(tmp_path / "old")
    monkeypatch.setattr(session, "run", lambda *_: None)
    assert run.main(["--out", str(tmp_path / "new"), "--compare", str(old), *more]) == code
    said = capsys.readouterr().out
    assert ("failed --fail-if-slower: no row of ours was compared" in said) is bool(code)
    assert f"not compared latency 8x128 bf16, hbert-v1: only in {old}" in said and "hf:" not in said


def test_runs_of_another_machine_are_not_compared(tmp_path, same_run, capsys):
    same_run()
    old = earlier(tmp_path / "old", cpu="another processor")
    with pytest.raises(SystemExit) as stopped:
        run.main(["--out", str(tmp_path / "new"), "--compare", str(old)])
    assert stopped.value.code == 2 and "measured on another processor" in capsys.readouterr().err


def test_runs_of_another_heap_are_not_compared(tmp_path, same_run, capsys):
    same_run()
    old = earlier(tmp_path / "old")
    with pytest.raises(SystemExit) as stopped:
        run.main(["--out", str(tmp_path / "new"), "--compare", str(old), "--heap", "ours"])
    assert stopped.value.code == 2 and "measured with heap_kept all" in capsys.readouterr().err


@pytest.mark.parametrize("noise, flags, code", [(True, ["--strict"], 4), (True, [], 0), (False, ["--strict"], 0)])
def test_a_busy_machine_is_told_and_with_strict_makes_the_exit_code_4(
    noise, flags, code, tmp_path, same_run, monkeypatch, capsys
):
    monkeypatch.setattr(bench.report, "MOST_DROPPED", 0.9)
    same_run(noise)
    assert run.main(["--out", str(tmp_path), *flags]) == code
    assert ("the same computation took from 1 to 2 ms" in capsys.readouterr().out) is noise


def test_it_runs_as_a_script_from_any_folder(tmp_path):
    command = [sys.executable, str(RUN), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for suite in SUITES:
        assert suite in done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A folder that may become a checkout of one commit, and git in it."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return tmp_path, git


def test_the_revision_says_dirty(checkout):
    folder, git = checkout
    assert git_revision(folder) is None
    git("init")
    (folder / "a").write_text("1")
    for name in ("docs/page.md", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("a table")
    git("add", ".")
    git("commit", "-m", "one")
    clean = git_revision(folder)
    assert len(clean) == 12
    (folder / "b").write_text("of the user")
    for name in ("docs/page.md", "README.md"):  # what is measured is the same
        (folder / name).write_text("another table")
    assert git_revision(folder) == clean
    (folder / "a").write_text("2")
    assert git_revision(folder) == f"{clean}-dirty"


def test_the_revision_is_that_of_what_is_measured(checkout, tmp_path_factory):
    folder, git = checkout
    here, elsewhere = folder / "hbert_kernels", tmp_path_factory.mktemp("site-packages") / "hbert_kernels"
    for name in (here, elsewhere, folder / "csrc"):
        name.mkdir()
    git("init")
    (folder / "csrc" / "a.cpp").write_text("1")
    git("add", "csrc")
    git("commit", "-m", "one")
    built = git("rev-parse", "--short=12", "HEAD")
    assert measured_revision(here, folder) == built  # nothing is compiled
    for package in (here, elsewhere):
        (package / "build_info.json").write_text(json.dumps({"git": built, "built": True}))
    git("commit", "--allow-empty", "-m", "two")
    now = git("rev-parse", "--short=12", "HEAD")
    assert measured_revision(here, folder) == now != built
    assert measured_revision(elsewhere, folder) == f"{built} (installed)"
    (folder / "csrc" / "a.cpp").write_text("2")
    git("commit", "-am", "three")
    now = git("rev-parse", "--short=12", "HEAD")
    assert measured_revision(here, folder) == f"{now} (kernels: {built})"
    (here / "build_info.json").write_text(json.dumps({"git": built, "built": False}))
    assert measured_revision(here, folder) == now
