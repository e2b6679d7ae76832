"""Against an earlier run: what counts as a change, by hand."""

import csv

import pytest
from bench_results import measured

import bench.compare
import hbert_kernels
from bench.compare import SLACK_MS, compare, kernels, lost, read
from bench.report import Report, save
from bench.rows import COLUMNS

ABOUT = {"device": "cpu", "threads": 2, "heap_kept": "all", "torch": "2", "cpu": "a processor", "git": "g", "date": "d"}
CPU = {"cpu": "a processor"}


def row(median, **others):
    return {
        "suite": "latency",
        "case": "base/1x128",
        "candidate": "hbert-v1",
        "baseline": "hf",
        "dtype": "bf16",
        "device": "cpu",
        "metric": "latency",
        "median": median,
        **others,
    }


def changed(before, now, threshold=0.05, **others):
    (key,) = {tuple(row(0, **others)[name] for name in ("suite", "case", "candidate", "dtype", "device"))}
    (change,) = compare({key: before}, [row(now, **others)], threshold)
    return change


@pytest.mark.parametrize(
    "before, now, verdict",
    [
        (10.0, 10.4, "no difference"),
        (10.0, 10.6, "slower"),
        (10.0, 9.4, "faster"),
        (10.0, 9.6, "no difference"),
        (0.1, 0.1 + 0.9 * SLACK_MS, "no difference"),
        (0.1, 0.1 + 1.1 * SLACK_MS, "slower"),
        (0.1, 0.1 - 1.1 * SLACK_MS, "faster"),
    ],
)
def test_a_change_is_more_than_the_threshold_and_the_slack(before, now, verdict):
    change = changed(before, now)
    assert change.verdict == verdict and change.change == pytest.approx(now / before - 1) and change.ours


@pytest.mark.parametrize("now, verdict, change", [(800.0, "slower", 0.25), (1250.0, "faster", -0.2)])
def test_a_rate_that_falls_is_a_call_that_takes_longer(now, verdict, change):
    others = {"suite": "throughput", "metric": "throughput"}
    found = changed(1000.0, now, **others)
    assert (found.verdict, found.change) == (verdict, pytest.approx(change))


def test_a_rate_has_no_slack():
    """Of a time 1e-3 is no change: of 1e5 tokens a second 6% of it."""
    assert changed(1e-3, 1.06e-3, suite="throughput", metric="throughput").verdict == "faster"
    assert changed(1e-3, 1.06e-3).verdict == "no difference"


def test_a_peer_is_not_ours():
    assert not changed(1.0, 2.0, candidate="ov-bf16").ours


def test_only_rows_of_both_runs_and_of_the_main_metric_are_compared():
    key = ("latency", "base/1x128", "hbert-v1", "bf16", "cpu")
    rows = [
        row(5.0),
        row(5.0, baseline="ov-bf16"),
        row(9.0, case="base/8x128"),
        row(1.0, metric="floor_ratio"),
        row(3.0, dtype="fp32"),
    ]
    (change,) = compare({key: 5.0, (*key[:3], "int8", "cpu"): 1.0}, rows, 0.05)
    assert (change.key, change.new, change.verdict) == (key, 5.0, "no difference")


def test_rows_of_ours_that_only_the_earlier_run_has_are_lost():
    key = ("latency", "base/1x128", "hbert-v1", "bf16", "cpu")
    other, peer = (*key[:3], "fp32", "cpu"), (*key[:2], "hf", "bf16", "cpu")
    old = dict.fromkeys((key, other, peer), 5.0)
    assert lost(old, compare(old, [row(5.0)], 0.05)) == [other]


@pytest.fixture
def written_on(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.compare, "kernels", lambda: ("avx2", True))

    def made(model):
        report = Report(ABOUT if model is None else ABOUT | {"cpu_model": model})
        report.add(measured(), ("hbert-v1",), ("hf",))
        return save(report, tmp_path, "old")[0]

    return made


@pytest.fixture
def written(written_on):
    return written_on(None)


def test_a_run_equals_itself(written):
    old = read(written, CPU, 2, "all")
    with written.open() as file:
        changes = compare(old, list(csv.DictReader(file)), 0.0)
    assert {change.key[2]: change.change for change in changes} == {"hf": 0.0, "hbert-v1": 0.0}
    assert old["latency", "8x128", "hf", "bf16", "cpu"] == 450.0


@pytest.mark.parametrize("cpu, threads", [("another", 2), ("a processor", 1)])
def test_another_machine_is_refused(written, cpu, threads):
    with pytest.raises(ValueError, match="measured on a processor, 2 threads; this is"):
        read(written, {"cpu": cpu}, threads, "all")


@pytest.mark.parametrize("there, here", [("25/1/1", "25/1/1"), ("25/1/1", None), (None, "26/2/1")])
def test_a_model_that_is_not_known_is_no_other_processor(written_on, there, here):
    assert read(written_on(there), CPU if here is None else CPU | {"cpu_model": here}, 2, "all")


def test_another_model_of_the_same_name_is_refused(written_on):
    message = r"measured on a processor \(25/1/1\), 2 threads; this is a processor \(26/2/1\), 2 threads"
    with pytest.raises(ValueError, match=message):
        read(written_on("25/1/1"), CPU | {"cpu_model": "26/2/1"}, 2, "all")


@pytest.mark.parametrize(
    "here, heap, message",
    [
        (("avx2", True), "ours", "measured with heap_kept all; in this run it is ours"),
        (("avx2", False), "all", "measured with heap_kept all; in this run it is none"),
        (("avx512_bf16", True), "all", "measured with isa of ours avx2; in this run it is avx512_bf16"),
    ],
)
def test_other_kernels_and_another_heap_are_refused(written, monkeypatch, here, heap, message):
    monkeypatch.setattr(bench.compare, "kernels", lambda: here)
    with pytest.raises(ValueError, match=message):
        read(written, CPU, 2, heap)


def test_the_level_of_a_peer_is_not_ours(written):
    text = written.read_text()
    written.write_text(
        "\n".join(line.replace("avx2", "avx512") if ",hf,hf," in line else line for line in text.splitlines())
    )
    assert written.read_text() != text and read(written, CPU, 2, "all")


def test_the_level_of_this_environment():
    isa, keeps_heap = kernels()
    assert isa == hbert_kernels.cpu_capability() and keeps_heap in (True, False)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "not a CSV of bench/run.py"),
        ("a,b\n1,2\n", "not a CSV of bench/run.py"),
        (",".join(COLUMNS) + "\n", "nothing was measured"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, text, reason):
    (tmp_path / "old.csv").write_text(text)
    with pytest.raises(ValueError, match=f"--compare.*{reason}"):
        read(tmp_path / "old.csv", CPU, 2, "all")
