"""The kernels suite: its cases, cold and warm buffers, memory, and a whole run of small shapes."""

import csv
import subprocess
import sys
from collections import Counter

import pytest

from bench import harness, machine, run, worker
from bench.device import Cpu
from bench.harness import FEWEST, FLOOR, MEMORY
from bench.lengths import spread_lengths
from bench.ops import HIDDEN, NAMES
from bench.rows import COLUMNS
from bench.suites.kernels import Floor, Kernel, Subject, builder
from bench.task import Task

CPU = Cpu()
OPS = ["--suite", "kernels", "--ops"]


def cases(*arguments):
    (plan,) = run.plan(run.parser().parse_args(["--suite", "kernels", *arguments]))
    return plan.cases


def test_the_cases_are_those_of_the_table():
    made = cases()
    names = {case.name for case in made}
    assert len({(case.name, case.dtype) for case in made}) == len(made)
    assert {case.params["op"] for case in made} == set(NAMES)
    assert {
        "layer_norm.residual/1x128/fwd/cache",
        "layer_norm.residual/8x512/bwd/dram",
        "additive_attention.core-per-head/8x128/fwd/dram",
        "additive_attention.dense/1x128/bwd/cache",
        "attention.full/1x2048/fwd/dram",
        "attention.varlen/8x512/bwd/dram",
        "masked_lm_loss/8x512/full/dram",
        "masked_lm_loss/8x512/full/peak",
    } <= names
    weighed = {case.name: case.peers for case in made if case.measures == (MEMORY,)}
    assert weighed == {
        "masked_lm_loss/8x512/full/peak": ("eager", "hbert"),
        "attention.full/1x2048/bwd/peak": ("sdpa", "hbert"),
        "attention.varlen/8x512/bwd/peak": ("sdpa", "hbert"),
        "additive_attention.dense/8x512/bwd/peak": ("eager", "hbert-direct", "hbert-key-free"),
    }


def test_flags_choose_among_the_cases(monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: True)
    chosen = cases("--ops", "conv_layer_norm", "--dtype", "bf16", "--shapes", "3x5")
    assert [case.name for case in chosen] == ["conv_layer_norm/3x5/fwd/cache", "conv_layer_norm/3x5/bwd/cache"]
    quick = cases("--quick")
    assert {case.dtype for case in quick} == {"bf16"} and len(quick) < len(cases()) / 4


def test_only_the_named_peers_take_part():
    (plan,) = run.plan(run.parser().parse_args([*OPS, "attention", "--peers", "sdpa", "--models", "hbert"]))
    assert plan.peers == ("sdpa", "hbert", FLOOR) and plan.teams == [plan.peers]
    for case in plan.cases:
        floor = set() if case.measures == (MEMORY,) else {FLOOR}
        assert set(case.peers) == {"sdpa", "hbert"} | floor


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 20)


@pytest.mark.parametrize("step", ["fwd", "bwd"])
def test_cold_buffers_take_turns_beyond_the_cache(step, small_cache):
    (case,) = [
        c
        for c in cases("--ops", "layer_norm", "--dtype", "bf16", "--shapes", "1x1024")
        if c.params["step"] == step and c.params["variant"] == "plain"
    ]
    subject = Subject(case, CPU)
    assert subject.turns * case.work >= 2 << 20 > (subject.turns - 1) * case.work
    kernel = Kernel(subject, "eager")
    for _ in range(subject.turns):
        kernel.step()
    places = {result[0].data_ptr() for result in kernel._results}
    assert len(places) == subject.turns
    assert len(Floor(subject)._calls) == subject.turns


def test_warm_buffers_are_the_same_ones():
    case = cases("--ops", "layer_norm", "--dtype", "fp32", "--shapes", "1x8")[0]
    assert Subject(case, CPU).turns == 1


@pytest.mark.parametrize("step", ["fwd", "bwd"])
def test_a_wrong_kernel_is_refused(step, monkeypatch):
    (case,) = [
        c for c in cases("--ops", "conv_layer_norm", "--dtype", "bf16", "--shapes", "2x9") if c.params["step"] == step
    ]
    right, eager = map(builder(case, CPU), ("hbert", "eager"))
    error, allowed = right.check()
    assert error <= allowed
    monkeypatch.setattr(right, "_function", lambda *inputs: eager._function(*inputs) * 1.05)
    error, allowed = right.check()
    assert error > allowed


def test_every_slice_has_an_untimed_call_and_one_of_many_short_calls_is_timed_in_groups(monkeypatch):
    server = worker.Server("bench.suites.kernels", CPU)
    steps = Counter()

    class Counted(Task):
        def step(self):
            steps["made"] += 1

        def check(self):
            return 0.0, 1.0

        def traits(self):
            return {}

    server._tasks["hbert"] = Counted()
    server.estimate("hbert")
    steps.clear()
    assert len(server.run("hbert", calls=1050)["seconds"]) <= worker.SAMPLES and steps["made"] >= 1050 + 1
    for calls in (1, 3):
        steps.clear()
        assert len(server.run("hbert", calls=calls)["seconds"]) == calls and steps["made"] == calls + 1


def test_a_new_case_takes_the_place_of_all_tasks(monkeypatch):
    built = []

    class Built:
        def traits(self):
            return {}

    def builder(case, device):
        built.append(case.name)
        return lambda peer: Built()

    monkeypatch.setattr("bench.suites.kernels.builder", builder)
    server = worker.Server("bench.suites.kernels", CPU)
    for name, peer in [("one", "a"), ("one", "b"), ("two", "a")]:
        server.prepare(peer, {"suite": "kernels", "name": name, "dtype": "fp32", "batch": 1, "seq": 1, "work": 1.0})
    assert built == ["one", "two"] and list(server._tasks) == ["a"]


def test_memory_is_that_of_a_peer_in_its_own_layout(monkeypatch):
    """What is weighed here are the gradients alone: of padded rows for sdpa, of packed ones for ours."""
    monkeypatch.setattr("bench.suites.kernels.peak_extra", lambda device, call: sum(made.nbytes for made in call()))
    (case,) = [
        c
        for c in cases("--ops", "attention", "--dtype", "fp32", "--shapes", "2x9")
        if c.name == "attention.varlen/2x9/bwd/peak"
    ]
    rows = {"sdpa": 2 * 9, "hbert": sum(spread_lengths(2, 9))}
    assert rows["hbert"] < rows["sdpa"]
    found = {peer: builder(case, CPU)(peer).peak_memory() for peer in rows}
    assert found == {peer: count * 3 * HIDDEN * 4 for peer, count in rows.items()}


PEAK = """
import sys
sys.path.append({root!r})
import torch
from bench.device import Cpu, peak_extra
def call():
    scratch = torch.ones({scratch} << 18)
    return [scratch[: {kept} << 18].clone()]
call()
print(peak_extra(Cpu(), call) / (1 << 20))
"""


@pytest.mark.parametrize("scratch, kept", [(64, 16), (128, 0)])
def test_peak_memory_is_that_of_the_scratch(scratch, kept):
    source = PEAK.format(root=str(machine.ROOT), scratch=scratch, kept=kept)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(scratch, abs=4)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The rows of a run of two ops at small shapes, at the lowest instruction set."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "DISTURBED", float("inf"))  # the machine of a test run is not quiet
        patch.setenv("HBERT_CPU_CAPABILITY", "scalar")
        flags = ["--peers", "eager", "--dtype", "bf16", "--shapes", "2x9", "--min-time", "0.005", "--threads", "1"]
        code = run.main([*OPS, "layer_norm,masked_lm_loss", *flags, "--out", str(folder)])
    (table,) = folder.glob("*.csv")
    return code, list(csv.DictReader(table.open()))


def test_a_whole_run_measures_times_rates_floors_and_memory(whole_run):
    code, rows = whole_run
    assert code == 0 and list(rows[0]) == list(COLUMNS)
    found = Counter((row["case"].split("/")[0], row["metric"]) for row in rows)
    assert found == {
        ("layer_norm.plain", "time"): 6,
        ("layer_norm.plain", "bandwidth"): 6,
        ("layer_norm.plain", "floor_ratio"): 4,
        ("layer_norm.residual", "time"): 6,
        ("layer_norm.residual", "bandwidth"): 6,
        ("layer_norm.residual", "floor_ratio"): 4,
        ("masked_lm_loss", "time"): 6,
        ("masked_lm_loss", "flop_rate"): 6,
        ("masked_lm_loss", "floor_ratio"): 4,
        ("masked_lm_loss", "peak_memory"): 2,
    }
    assert all(float(row["median"]) > 0 for row in rows if row["metric"] != "peak_memory")
    assert all(int(row["rounds"]) >= FEWEST for row in rows if row["metric"] != "peak_memory")


def test_the_level_and_the_floor_of_a_row_are_told(whole_run):
    rows = whole_run[1]
    assert {row["isa"] for row in rows if row["candidate"] == "hbert"} <= {"scalar", "none"}
    assert {row["backend"] for row in rows if row["candidate"] == FLOOR} <= {"stream", "packed product", "product"}
    for row in rows:
        if row["metric"] == "floor_ratio":
            ratio, inverse = float(row["ratio"]), 1 / float(row["median"])
            assert row["baseline"] == FLOOR
            if int(row["rounds"]) % 2:
                assert ratio == pytest.approx(inverse, rel=1e-4)
            else:
                # The mean of two inverses is at least the inverse of their mean.
                assert inverse * (1 - 1e-4) <= ratio <= (1 + 1e-4) / float(row["p10"])
