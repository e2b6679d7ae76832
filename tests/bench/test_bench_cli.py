"""The command line: what it refuses, what it plans, and how it ends."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench_results import SECONDS, measured

import bench.report
from bench import compare, engines, machine, run, session
from bench.harness import MEMORY, TIME, Failure
from bench.report import Report, save
from bench.suites import SUITES

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


OURS = ("hbert-v1+optimize", "hbert-v2+optimize", "bert+optimize")
FLOORS = ("floor-hbert-v1", "floor-hbert-v2", "floor-bert")


def test_the_default_is_the_documented_one():
    latency, throughput = planned()
    assert latency.peers == ("hf", "ort-fp32", "ort-int8", "ov-fp32", "ov-bf16", "ov-int8", *OURS, *FLOORS)
    assert {case.dtype: case.peers for case in latency.cases} == {
        "fp32": ("hf", "ort-fp32", "ov-fp32", *OURS, *FLOORS),
        "bf16": ("hf", "ov-bf16", *OURS, *FLOORS),
    }
    trained = ("hbert-v1", "hbert-v2", "hbert-vanilla")
    theirs = ("hf", "hf-compile", "hf-fp32")
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
    (in_fp32,) = planned("--suite", "throughput", "--dtype", "fp32")
    assert [case.peers[:3] for case in in_fp32.cases] == [("hf", "hf-compile", "hbert-v1")] * 2


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
    kept, left_out = run.installed(planned("--suite", "latency", "--peers", "hf,ov-fp32,ov-int8,ort-fp32"))
    assert kept[0].baselines == ("hf", "ort-fp32") and "hbert-v1+optimize" in kept[0].peers
    assert {one.peer: one.reason for one in left_out} == {
        "ov-fp32": "openvino is not installed: pip install openvino",
        "ov-int8": "openvino and nncf are not installed: pip install openvino nncf",
    }


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("suite", ["latency", "varlen", "throughput"])
def test_memory_is_measured_where_the_system_counts_it(suite, counted, monkeypatch):
    monkeypatch.setattr(machine, "counts_peak_memory", lambda: counted)
    (only,) = planned("--suite", suite)
    assert only.cases[0].measures == ((TIME, MEMORY) if counted else (TIME,))


def test_without_bf16_products_the_default_is_less_of_fp32(flags):
    flags.remove("avx512f")
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


def test_the_header_says_what_was_left_out(flags):
    options = run.parser().parse_args([])
    assert "bf16" not in run.about(options, [0], [])
    flags.remove("avx512f")
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
    assert machine.git_revision(folder) == "unknown"
    git("init")
    (folder / "a").write_text("1")
    for name in ("docs/page.md", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("a table")
    git("add", ".")
    git("commit", "-m", "one")
    clean = machine.git_revision(folder)
    assert len(clean) == 12
    (folder / "b").write_text("of the user")
    for name in ("docs/page.md", "README.md"):  # what is measured is the same
        (folder / name).write_text("another table")
    assert machine.git_revision(folder) == clean
    (folder / "a").write_text("2")
    assert machine.git_revision(folder) == f"{clean}-dirty"


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
    assert machine.measured_revision(here, folder) == built  # nothing is compiled
    for package in (here, elsewhere):
        (package / "build_info.json").write_text(json.dumps({"git": built, "built": True}))
    git("commit", "--allow-empty", "-m", "two")
    now = git("rev-parse", "--short=12", "HEAD")
    assert machine.measured_revision(here, folder) == now != built
    assert machine.measured_revision(elsewhere, folder) == f"{built} (installed)"
    (folder / "csrc" / "a.cpp").write_text("2")
    git("commit", "-am", "three")
    now = git("rev-parse", "--short=12", "HEAD")
    assert machine.measured_revision(here, folder) == f"{now} (kernels: {built})"
    (here / "build_info.json").write_text(json.dumps({"git": built, "built": False}))
    assert machine.measured_revision(here, folder) == now
