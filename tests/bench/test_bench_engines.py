"""Runtimes beside torch: their processes, what is exported for them, and the gate that they pass like everybody."""

import importlib.util
import subprocess
import sys
import time
import types

import numpy as np
import onnxruntime
import pytest
import torch

from bench import artifacts, client, engines, harness, machine, session
from bench.artifacts import Artifacts
from bench.client import ENGINE_MODULE, Setup, WorkerError, start_worker
from bench.cpu import Cpu
from bench.engines.forward import _TRIALS, EngineForward
from bench.exports import Exporter, _once
from bench.harness import Case
from bench.names import ENGINE_PEERS, fixed_dtype
from bench.peers import build
from bench.report import Report
from bench.suites import SUITES
from bench.suites.suite import Wanted

ABOUT = dict.fromkeys(("threads", "heap_kept", "torch", "cpu", "git", "date"), "x")
CPUS = machine.cores()[:1]
CASE = Case("latency", "tiny/2x9", "fp32", 2, 9, 18, {"size": "tiny", "padded": True})
# OpenVINO has no bf16 on a processor without such products, and what is not installed cannot be tried.
INSTALLED = tuple(peer for peer in ENGINE_PEERS if engines.not_installed(peer) is None and (peer != "ov-bf16"))


@pytest.fixture(scope="module")
def whole_run():
    """The rows and failures of padded batches in all runtimes that are installed here."""
    cases = SUITES["varlen"].cases(Wanted(shapes=((4, 19),), dtypes=("fp32",), sizes=("tiny",)))
    plan = session.SuitePlan(SUITES["varlen"], ("bert+optimize",), INSTALLED, tuple(cases), 0.02)
    report = Report(dict(ABOUT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "DISTURBED", float("inf"))  # the machine of a test run is not quiet
        session.run([plan], Setup(CPUS), report, lambda: None)
    return report


def test_every_runtime_that_is_installed_is_measured_in_both_forms_of_a_batch(whole_run):
    assert whole_run.failures == [] and "ort-fp32" in INSTALLED
    timed = {(row["case"], row["candidate"]) for row in whole_run.rows if row["metric"] == "latency"}
    for peer in (*INSTALLED, "bert+optimize"):
        assert ("tiny/4x19", peer) in timed and ("tiny/4x19/buckets", peer) in timed


def test_runtimes_compute_the_same_as_torch_as_closely_as_their_dtype_allows(whole_run):
    for row in whole_run.rows:
        if row["metric"] == "latency" and row["candidate"] in INSTALLED:
            least, most = {"fp32": (0, 1e-5), "int8": (1e-4, 0.1)}[fixed_dtype(row["candidate"])]
            assert least < row["max_err"] < most, row["candidate"]


def test_rows_name_the_runtime_its_variant_and_its_threads(whole_run):
    backends = {row["candidate"]: row["backend"] for row in whole_run.rows}
    for peer in INSTALLED:
        package = engines.DISTRIBUTIONS[engines.family(peer)]
        assert backends[peer].startswith(f"{package} {importlib.metadata.version(package)}, ")
        assert "1 thread" in backends[peer] or machine.UNCHECKED in backends[peer] or "ct2" in peer
    assert "arena" in backends["ort-fp32"]


def test_memory_of_runtimes_is_measured(whole_run):
    found = {row["candidate"]: row["median"] for row in whole_run.rows if row["metric"] == "peak_memory"}
    assert set(found) == ({*INSTALLED, "bert+optimize"} if machine.counts_peak_memory() else set())
    assert all(mebibytes > 3 for mebibytes in found.values())  # the embedding of 30,522 x 128 in int8


def test_their_processes_have_no_torch():
    source = "import sys, bench.worker, bench.engines.forward; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.fixture
def environment_of(monkeypatch):
    """The environment of a worker that is started so."""
    monkeypatch.setenv("OMP_PLACES", "{0}")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(client, "_WORKER", "-c")  # with the module's place for the program

    def started(keep_heap, openmp):
        worker = start_worker("import json, os; print(json.dumps(dict(os.environ)))", Setup([0, 1]), keep_heap, openmp)
        try:
            return worker.reply()
        finally:
            worker.close()

    return started


@pytest.mark.parametrize("keep_heap", [True, False])
def test_their_environment_has_no_openmp_but_where_that_is_theirs_and_keeps_the_heap(
    keep_heap, environment_of, monkeypatch
):
    monkeypatch.setattr(client, "ENGINES", "import ")
    found = [environment_of(keep_heap, openmp) for openmp in (True, False)]
    assert found[0]["OMP_PLACES"] == "{0},{1}" and not any(name.startswith("OMP_") for name in found[1])
    for environment in found:
        assert ("glibc.malloc.trim_threshold" in environment.get("GLIBC_TUNABLES", "")) is keep_heap


def test_a_worker_with_torch_keeps_its_heap_by_itself(environment_of):
    assert "GLIBC_TUNABLES" not in environment_of(keep_heap=True, openmp=True)


def test_they_run_on_a_cpu_only():
    worker = start_worker(ENGINE_MODULE, Setup([0], device="cuda"), keep_heap=False, openmp=False)
    try:
        with pytest.raises(WorkerError, match="measured on cpu only"):
            worker.reply()
    finally:
        worker.close()


class Loaded:
    """An engine that gives what it was told to, after `seconds`."""

    def __init__(self, states, seconds=0.0):
        self.states, self.seconds, self.log = states, seconds, lambda: None

    def prepared(self, ids, mask):
        def call():
            self.log()
            time.sleep(self.seconds)
            return self.states

        return call


@pytest.fixture
def task_of(tmp_path, monkeypatch):
    """The task of a peer whose runtime is a stand-in with the given variants."""
    monkeypatch.setattr(machine, "busy_threads", lambda step: [])  # or this process would be bound
    monkeypatch.setattr(machine, "confine", lambda cpus: None)

    def made(peer, **variants):
        fake = types.ModuleType("bench.engines.ort")
        fake.variants = lambda peer, graphs, cpus: {name: lambda one=one: one for name, one in variants.items()}
        monkeypatch.setitem(sys.modules, "bench.engines.ort", fake)
        params = {**CASE.params, "expected": {peer: path(peer)}, "graphs": {peer: {}}, "cpus": [0]}
        return EngineForward(peer, Case(**{**vars(CASE), "params": params}), Cpu())

    def path(peer):
        return Exporter().expected(vars(CASE), fixed_dtype(peer), str(tmp_path))["path"]

    made.path = path
    return made


def right_states(path):
    with np.load(path) as stored:
        states = np.zeros((2, 9, 128))
        states[stored["mask0"] == 1] = stored["right"]
    return states


@pytest.mark.parametrize(
    "peer, off, passes",
    [
        ("ort-fp32", 0.0, True),
        ("ort-fp32", 1e-4, False),
        ("ort-int8", 0.01, True),
        ("ort-int8", 0.8, True),
        ("ort-int8", 1.2, False),
        ("ort-fp32", np.nan, False),
    ],
)
def test_the_gate_of_a_runtime(peer, off, passes, task_of):
    states = right_states(task_of.path(peer))
    states[0, 3] += off
    states[1, -1] += 9.0  # padding
    error, allowed = task_of(peer, only=Loaded(states)).check()
    assert (error <= allowed) is passes


def test_the_fastest_variant_is_timed_and_named(task_of):
    states = right_states(task_of.path("ort-fp32"))
    task = task_of("ort-fp32", slow=Loaded(states, 0.05), fast=Loaded(states), slower=Loaded(states, 0.1))
    assert ", fast, " in task.traits()["backend"]


def test_variants_are_tried_with_bound_threads(task_of, monkeypatch):
    log = []
    monkeypatch.setattr(machine, "bind", lambda threads, cpus: log.append("bind") or "bound")
    states = right_states(task_of.path("ort-fp32"))
    variants = {name: Loaded(states) for name in ("one", "two")}
    for name, variant in variants.items():
        variant.log = lambda name=name: log.append(name)
    task_of("ort-fp32", **variants)
    trials = list(zip(log, log[1:], strict=False))
    # A call, then the threads that worked in it are bound, then three calls at least that are timed.
    for name in variants:
        at = trials.index((name, "bind"))
        assert log[at + 2 : at + 2 + _TRIALS] == [name] * _TRIALS


def test_a_failed_export_is_that_peers_alone(monkeypatch, tmp_path):
    class Exporting:
        alive = True

        def reply(self):
            return {}

        def ask(self, do, **arguments):
            if arguments.get("peer") == "ov-fp32":
                raise WorkerError("ImportError: no converter")
            return {"paths": {"exported": "a.onnx"}} if do == "graphs" else {"path": f"{arguments['dtype']}.npz"}

        def close(self):
            closed.append(True)

    closed = []
    monkeypatch.setattr(artifacts, "start_exporter", Exporting)
    failures = []
    with Artifacts(tmp_path, [0]) as made:
        case, fit = made.fitted(CASE, ["hf", "ov-fp32", "ort-int8"], failures)
    assert fit == ["hf", "ort-int8"] and closed == [True]
    assert [(one.peer, one.reason) for one in failures] == [("ov-fp32", "no export: ImportError: no converter")]
    assert case.params["graphs"] == {"ort-int8": {"exported": "a.onnx"}} and case.params["cpus"] == [0]
    assert case.params["expected"] == {"ort-int8": "int8.npz"}
    assert Artifacts(tmp_path, [0]).fitted(CASE, ["hf"], failures) == (CASE, ["hf"])


def test_a_trained_model_is_not_spoilt_by_quantizing(tmp_path):
    """Weights of one large channel: with one scale for all of them the others would be lost."""
    torch.manual_seed(0)
    model = build("hf", "encoder", "tiny")
    for name, weight in model.named_parameters():
        if name.endswith("dense.weight"):
            weight.data[3] *= 100
    model.save_pretrained(tmp_path / "model")
    size = str(tmp_path / "model")
    case = vars(Case("latency", "model/1x9", "fp32", 1, 9, 9, {"size": size}))
    made = Exporter()
    with torch.no_grad():
        graphs = made.graphs("ort-int8", case, str(tmp_path))["paths"]
    with np.load(made.expected(case, "int8", str(tmp_path))["path"]) as stored:
        for graph in graphs.values():
            session_of = onnxruntime.InferenceSession(graph)
            (states,) = session_of.run(None, {"input_ids": stored["ids0"], "attention_mask": stored["mask0"]})
            assert np.linalg.norm(states[0] - stored["right"]) < 0.15 * np.linalg.norm(stored["right"])


def test_what_was_made_in_part_is_made_again(tmp_path):
    made = []

    def fails(path):
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        _once(tmp_path / "model", fails)
    for _ in range(2):
        _once(tmp_path / "model", lambda path: made.append(path.write_text("whole")))
    assert len(made) == 1 and (tmp_path / "model").read_text() == "whole"


BINDING = """
import os, sys, threading, time
sys.path.append({root!r})
from bench import machine
cpus = machine.cores()
start, stop = threading.Event(), threading.Event()
def spin():
    while not stop.is_set():
        sum(range(2000))
threads = [threading.Thread(target=spin) for _ in range({extra})]
for thread in threads:
    thread.start()
busy = machine.busy_threads(lambda: sum(range(2000)), seconds=0.5)
try:
    print(machine.bind(busy, cpus[:{allowed}]))
    bound = [os.sched_getaffinity(thread) for thread in busy[:{allowed}]]
    assert sorted(map(min, bound)) == cpus[:{allowed}] and all(len(mask) == 1 for mask in bound)
finally:
    stop.set()
"""


@pytest.mark.skipif(not machine.busy_threads(lambda: None), reason="the system does not tell what threads do")
@pytest.mark.parametrize("extra", [0, 1])
def test_the_threads_that_work_are_found_and_bound_one_to_a_core(extra):
    allowed = min(1 + extra, len(machine.cores()))
    script = BINDING.format(root=str(machine.ROOT), extra=extra, allowed=allowed)
    command = [f"import os; os.sched_setaffinity(0, set({machine.cores()[:allowed]}))\n" + script]
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{1 + extra} thread{'s' if extra else ''}, {machine.PINNED}"


@pytest.mark.parametrize(
    "masks, cpus, bound",
    [
        ({1: {0}, 2: {0}}, [0, 1], {2: {1}}),
        ({1: {0, 5}}, [0], {1: {0}}),
        ({1: {1}, 2: {0, 1}}, [0, 1], {2: {0}}),
        ({1: {0, 1}, 2: {0, 1}, 3: {0, 1}}, [4, 6], {1: {4}, 2: {6}}),
        ({1: {1}, 2: {0}}, [0, 1], {}),
    ],
)
def test_threads_without_a_core_of_their_own_get_one(masks, cpus, bound, monkeypatch):
    made = {}
    monkeypatch.setattr(machine.os, "sched_getaffinity", masks.__getitem__)
    monkeypatch.setattr(machine.os, "sched_setaffinity", made.__setitem__)
    assert machine.bind(list(masks), cpus) == f"{len(masks)} thread{'s' if len(masks) > 1 else ''}, {machine.PINNED}"
    assert made == bound


def test_a_runtime_with_fewer_threads_than_cores_is_refused(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_setaffinity", lambda *_: pytest.fail("bound"))
    with pytest.raises(RuntimeError, match="cores stand idle: 2 are there to be used, threads that work in a call: 1"):
        machine.bind([1], [0, 1])


def test_unknown_threads_are_told_as_unchecked():
    assert machine.bind([], [0]) == machine.UNCHECKED


@pytest.mark.skipif(engines.not_installed("torchao-int8") is not None, reason="torchao is optional")
def test_torchao_quantizes_the_linear_layers():
    from bench.peers import serving

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(False), torch.no_grad():
        patch.setattr("bench.peers.compiled", lambda peer, model: model)  # a minute
        model = serving("torchao-int8", build("hf", "encoder", "tiny"), "fp32", Cpu())
        weight = model.encoder.layer[0].intermediate.dense.weight
    assert "int8" in f"{weight}".lower() or weight.dtype == torch.int8
