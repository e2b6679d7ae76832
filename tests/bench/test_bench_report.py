"""Rows, files and the table, against figures worked out by hand."""

import csv
import io
import json
import os

import pytest
from bench_results import measured
from rich.console import Console

from bench.harness import Case, Failure, Gate, Result, Slice
from bench.report import Report, check_writable, save
from bench.rows import COLUMNS, Memory
from bench.tables import show

ABOUT = {
    "device": "cpu",
    "threads": 2,
    "heap_kept": "ours",
    "torch": "2.13.0",
    "cpu": "a processor",
    "cpu_model": "25/1/1",
    "git": "abc-dirty",
    "date": "2026-01-02T03:04:05",
}


def report(*results, baselines=("hf", "hf-compile")):
    made = Report(dict(ABOUT))
    for one in results:
        made.add(one, ("hbert-v1", "hbert-v2"), baselines)
    return made


def row(made, candidate, baseline):
    (found,) = [r for r in made.rows if (r["candidate"], r["baseline"]) == (candidate, baseline)]
    return found


def test_the_columns_are_fixed(tmp_path):
    csv_path, json_path = save(report(measured()), tmp_path, "run")
    lines = csv_path.read_text().splitlines()
    assert lines[0] == (
        "suite,case,candidate,baseline,dtype,batch,seq,metric,unit,median,p10,p90,p99,median_lo,median_hi,ratio,ratio_lo,ratio_hi,verdict,"
        "max_err,rounds,dropped,canary_ms,canary_drift,device,threads,heap_kept,isa,backend,torch,cpu,cpu_model,git,date"
    )
    assert lines[1] == (
        "latency,8x128,hf,hf,bf16,8,128,latency,ms,450,400,650,,400,600,1,1,1,,0,3,4,1,0,cpu,2,ours,avx2,backend of hf,"
        "2.13.0,a processor,25/1/1,abc-dirty,2026-01-02T03:04:05"
    )
    assert len(lines) == 1 + 4  # two baselines, and one candidate against each
    stored = json.loads(json_path.read_text())
    assert stored["about"] == ABOUT and [list(r) for r in stored["rows"]] == [list(COLUMNS)] * 4
    assert stored["rounds"][2]["peers"]["hf"] == {"seconds": [0.4, 0.4], "wait": 0.0}


def test_a_time_is_better_when_it_is_smaller():
    ours = row(report(measured()), "hbert-v1", "hf")
    assert (ours["metric"], ours["unit"], ours["median"]) == ("latency", "ms", 250.0)
    assert (ours["ratio"], ours["ratio_lo"], ours["ratio_hi"]) == pytest.approx((2.0, 1.0, 3.0))
    assert ours["max_err"] == pytest.approx(0.001) and ours["backend"] == "backend of hbert-v1"


@pytest.mark.parametrize("seconds, verdict", [(0.1, "faster"), (0.9, "slower"), (0.45, "no difference")])
def test_the_verdict_is_of_the_interval(seconds, verdict):
    calls = {"hf": [(0.4,), (0.45,), (0.5,)], "hbert-v1": [(seconds,)] * 3}
    made = report(measured(peers=tuple(calls), calls=calls))
    assert row(made, "hbert-v1", "hf")["verdict"] == verdict and row(made, "hf", "hf")["verdict"] == ""


def test_the_interval_of_a_median_is_that_of_the_rounds():
    """Of nine rounds the second smallest and largest; one call of a round does not move it."""
    calls = {"hbert-v1": [(0.1 * turn, 0.1 * turn, 9.0) for turn in (5, 3, 1, 9, 7, 2, 8, 6, 4)]}
    latency, rate = (measured(suite, tuple(calls), calls) for suite in ("latency", "throughput"))
    for result, ends in ((latency, (200, 800)), (rate, (1024 / 0.8, 1024 / 0.2))):
        found = row(report(result), "hbert-v1", "")
        assert (found["median_lo"], found["median_hi"]) == pytest.approx(ends)


def test_a_rate_is_better_when_it_is_larger():
    ours = row(report(measured("throughput")), "hbert-v1", "hf")
    assert (ours["metric"], ours["unit"], ours["median"]) == ("throughput", "tokens/s", 1024 / 0.25)
    assert (ours["ratio"], ours["ratio_lo"], ours["ratio_hi"]) == pytest.approx((2.0, 1.0, 3.0))
    assert ours["p10"] < ours["median"] < ours["p90"]


def test_each_baseline_has_its_own_ratio():
    made = report(measured())
    assert row(made, "hbert-v1", "hf-compile")["ratio"] == pytest.approx(0.8)
    assert row(made, "hf-compile", "hf-compile")["ratio"] == 1.0


def test_p99_from_200_calls():
    calls = {"hf": [tuple(0.001 * (i + 1) for i in range(67))] * 3}
    made = row(report(measured(peers=("hf",), calls=calls)), "hf", "hf")
    assert 66 <= made["p99"] <= 67


def test_without_a_baseline_there_is_no_ratio(tmp_path):
    made = report(measured(peers=("hbert-v1",)))
    assert row(made, "hbert-v1", "")["ratio"] is None
    (cells,) = csv.DictReader(io.StringIO(save(made, tmp_path, "run")[0].read_text()))
    assert (cells["ratio"], cells["ratio_lo"], cells["baseline"]) == ("", "", "")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (old,) = save(report(), tmp_path, "run")[:1]
    before = old.read_text()

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save(report(measured()), tmp_path, "run")
    assert old.read_text() == before and sorted(p.name for p in tmp_path.iterdir()) == ["run.csv", "run.json"]


def test_an_unwritable_folder_is_found_out_first(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        check_writable(tmp_path / "file")


def test_the_table_shows_figures_and_failures():
    made = report(measured())
    made.failures.append(Failure("latency", "8x128", "bf16", "hbert-v2", "not timed: wrong"))
    console = Console(file=io.StringIO(), width=140)
    show(made, console)
    text = console.file.getvalue()
    assert "2.00 [1.00, 3.00] v hf" in text and "450" in text and "3 (4)" in text
    assert "failed latency 8x128 bf16, hbert-v2: not timed: wrong" in text
    assert "abc-dirty" in text and "4 slices" in text


def kernel_result():
    """eager 4 ms, hbert 2 ms, the floor 1 ms, and 8 MB in each call."""
    case = Case(
        "kernels",
        "layer_norm.plain/8x128/fwd/dram",
        "bf16",
        8,
        128,
        work=8e6,
        params={"op": "layer_norm", "variant": "plain", "step": "fwd"},
    )
    seconds = {"eager": 0.004, "hbert": 0.002, "floor": 0.001}
    return Result(
        case,
        gates={peer: Gate(0.001, 1.0) for peer in seconds},
        traits={peer: {"isa": "avx2", "backend": "b"} for peer in seconds},
        rounds=[{peer: Slice((value,), 0.0) for peer, value in seconds.items()}] * 3,
    )


def test_rates_and_floor_ratios_of_a_kernel_by_hand():
    made = Report(dict(ABOUT))
    made.add(kernel_result(), ("hbert",), ("eager",))
    found = {(r["candidate"], r["baseline"], r["metric"]): (r["median"], r["unit"], r["ratio"]) for r in made.rows}
    assert found == {
        ("eager", "eager", "time"): (4.0, "ms", 1.0),
        ("hbert", "eager", "time"): (2.0, "ms", 2.0),
        ("floor", "", "time"): (1.0, "ms", None),
        ("eager", "", "bandwidth"): (2.0, "GB/s", None),
        ("hbert", "", "bandwidth"): (4.0, "GB/s", None),
        ("floor", "", "bandwidth"): (8.0, "GB/s", None),
        ("eager", "floor", "floor_ratio"): (4.0, "x floor", 0.25),
        ("hbert", "floor", "floor_ratio"): (2.0, "x floor", 0.5),
    }


def training_result():
    """bert 4 s and 96 MiB, hbert-v1 2 s and 24 MiB, of which 1 s is products; 1024 tokens a step."""
    case = Case("throughput", "base/8x128", "bf16", 8, 128, work=1024)
    seconds = {"hf": 4.0, "hbert-v1": 2.0, "floor-hbert-v1": 1.0}
    return Result(
        case,
        gates={peer: Gate(0.001, 1.0) for peer in seconds},
        traits={peer: {"isa": "avx2", "backend": "b"} for peer in seconds},
        rounds=[{peer: Slice((value,), 0.0) for peer, value in seconds.items()}] * 3,
        canary=[0.001, 0.001, 0.0012],
        peak={"hf": 96 << 20, "hbert-v1": 24 << 20},
    )


def test_floor_and_memory_of_a_training_step_by_hand():
    made = Report(dict(ABOUT))
    made.add(training_result(), ("hbert-v1",), ("hf",))
    found = {(r["case"], r["candidate"], r["baseline"], r["metric"]): (r["median"], r["ratio"]) for r in made.rows}
    step, peak = "base/8x128", "base/8x128/peak"
    assert found == {
        (step, "hf", "hf", "throughput"): (256.0, 1.0),
        (step, "hbert-v1", "hf", "throughput"): (512.0, 2.0),
        (step, "floor-hbert-v1", "", "throughput"): (1024.0, None),
        (step, "hbert-v1", "floor-hbert-v1", "floor_ratio"): (2.0, 0.5),
        (peak, "hf", "hf", "peak_memory"): (96.0, 1.0),
        (peak, "hbert-v1", "hf", "peak_memory"): (24.0, 4.0),
    }


def test_operations_a_second_are_those_of_the_floor():
    result = training_result()
    result.traits["floor-hbert-v1"]["gflop"] = "300"
    made = Report(dict(ABOUT))
    made.add(result, ("hbert-v1",), ("hf",))
    found = {r["candidate"]: (r["median"], r["unit"]) for r in made.rows if r["metric"] == "flop_rate"}
    assert found == {"hbert-v1": (150.0, "GFLOP/s"), "floor-hbert-v1": (300.0, "GFLOP/s")}


def test_the_canary_of_a_case_is_in_its_rows():
    made = Report(dict(ABOUT))
    made.add(training_result(), ("hbert-v1",), ("hf",))
    timed = [r for r in made.rows if r["metric"] != "peak_memory"]
    assert {r["canary_ms"] for r in timed} == {1.0}
    assert {round(r["canary_drift"], 3) for r in timed} == {0.16}  # p10 1 ms, p90 1.16 ms
    assert {r["canary_ms"] for r in made.rows if r["metric"] == "peak_memory"} == {None}


def test_what_others_say_is_printed_as_it_is():
    texts = ["python bench/run.py [bold]", "no [/such] tag", "KeyError: [red]", "pip install 'x[y]'", "ort 1, [dim]"]
    command, failed, _, left_out, backend = texts
    made = Report({**ABOUT, "command": command})
    made.add(measured(), ("hbert-v1",), ("hf",))
    for one in made.rows:
        one["backend"] = backend
    made.failures += [Failure("latency", "a [b]", "fp32", "hf", reason) for reason in (failed, texts[2])]
    made.left_out.append(Failure("latency", "", "", "hf", left_out))
    console = Console(file=io.StringIO(), width=180)
    show(made, console)
    assert all(text in console.file.getvalue() for text in (*texts, "a [b]"))


def test_a_table_without_rates_keeps_the_spread_beside_the_floor():
    made = Report(dict(ABOUT))
    made.add(training_result(), ("hbert-v1",), ("hf",))
    console = Console(file=io.StringIO(), width=180)
    show(made, console)
    line, peak = [line for line in console.file.getvalue().splitlines() if " hbert-v1 " in line]
    assert line.split() == [
        "hbert-v1",
        "512",
        "512-512",
        "2.00",
        "[2.00,",
        "2.00]",
        "v",
        "hf",
        "2.00",
        "1.0e-03",
        "3",
        "(0)",
        "b",
    ]
    assert peak.split()[:2] == ["hbert-v1", "24"]


def test_memory_is_compared_like_time():
    made = Report(dict(ABOUT))
    traits = {"isa": "avx2", "backend": "b"}
    peak = {"eager": 96 << 20, "hbert": 24 << 20}
    made.add_memory(Memory(kernel_result().case, peak, dict.fromkeys(peak, traits)), ("hbert",), ("eager",))
    ours = row(made, "hbert", "eager")
    assert (ours["metric"], ours["median"], ours["unit"], ours["ratio"], ours["max_err"]) == (
        "peak_memory",
        24.0,
        "MiB",
        4.0,
        None,
    )


def test_the_table_of_kernels_has_rate_and_floor_beside_the_time():
    made = Report(dict(ABOUT))
    made.add(kernel_result(), ("hbert",), ("eager",))
    console = Console(file=io.StringIO(), width=180)
    show(made, console)
    (line,) = [line for line in console.file.getvalue().splitlines() if " hbert " in line]
    assert line.split() == [
        "hbert",
        "2",
        "2.00",
        "[2.00,",
        "2.00]",
        "v",
        "eager",
        "4",
        "GB/s",
        "2.00",
        "1.0e-03",
        "3",
        "(0)",
        "b",
    ]
