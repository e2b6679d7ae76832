"""Devices: how calls are timed on each, on a stand-in for a GPU that writes down what it is asked."""

import subprocess
import types
from contextlib import contextmanager

import pytest
import torch

from bench import device, run, session, worker
from bench.device import Cpu, Cuda, missing, open_device, peak_extra
from bench.ops import NAMES, ON_CPU_ONLY
from bench.suites.kernels import Kernel, Subject
from bench.task import Task

L2 = 3 << 20
PROPERTIES = types.SimpleNamespace(
    name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=L2
)


class Gpu:
    """What Cuda needs of torch.cuda. Calls end a millisecond after they were begun, flushes take no time."""

    def __init__(self, properties=PROPERTIES):
        self.log, self.clock, self.properties = [], 0.0, properties
        self.capture_error = None
        self.memory, self.peak = 100, 100
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("event")
                self.at = gpu.clock

            def elapsed_time(self, other):
                assert gpu.log[-1] == "synchronize", "read before the device was done"
                return other.at - self.at

        class CUDAGraph:
            def replay(self):
                gpu.call("replay")

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def call(self, name="call"):
        self.log.append(name)
        self.clock += 1.0

    def Stream(self):
        return "a stream"

    def set_stream(self, stream):
        self.log.append(f"on {stream}")

    def get_device_properties(self, index):
        return self.properties

    def synchronize(self):
        self.log.append("synchronize")

    @contextmanager
    def graph(self, graph, stream):
        assert stream == "a stream"
        self.log.append("capture")
        yield
        if self.capture_error:
            raise self.capture_error

    def reset_peak_memory_stats(self):
        self.peak = self.memory

    def memory_allocated(self):
        return self.memory

    def max_memory_allocated(self):
        return self.peak


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def cuda(gpu):
    """A Cuda device whose tensors lie on the CPU."""
    made = Cuda(gpu, "cpu")
    gpu.log.clear()
    return made


def test_groups_are_timed_between_events_and_read_when_all_is_done(gpu, cuda):
    assert cuda.time(gpu.call, group=3, samples=2) == pytest.approx([0.001, 0.001])
    assert gpu.log == 2 * ["event", "call", "call", "call", "event"] + ["synchronize"]


def test_the_cache_is_emptied_before_each_call_and_outside_the_events(gpu, cuda, monkeypatch):
    written = []
    zero = torch.Tensor.zero_

    def spy(tensor):
        gpu.log.append("flush")
        written.append(tensor.nbytes)
        return zero(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", spy)
    cuda.time(gpu.call, group=1, samples=2, flush=True)
    assert gpu.log == 2 * ["flush", "event", "call", "event"] + ["synchronize"]
    assert written == [2 * L2, 2 * L2]


def test_a_gpu_is_warmed_up_by_three_calls_a_cpu_by_one(gpu, cuda):
    cuda.warm_up(gpu.call)
    assert gpu.log == ["call"] * cuda.untimed + ["synchronize"] and cuda.untimed == 3
    made = []
    Cpu().warm_up(lambda: made.append("call"))
    assert made == ["call"] * Cpu.untimed == ["call"]


def test_work_runs_on_a_stream_that_can_be_captured():
    gpu = Gpu()
    Cuda(gpu, "cpu")
    assert gpu.log == ["on a stream"]


def test_a_captured_step_is_replayed(gpu, cuda):
    step, note = cuda.captured(gpu.call)
    assert note == "graph" and gpu.log.index("capture") > gpu.log.index("synchronize")
    gpu.log.clear()
    step()
    assert gpu.log == ["replay"]


def test_what_cannot_be_captured_stays_as_it_was_and_says_why(gpu, cuda):
    gpu.capture_error = RuntimeError("operation not permitted when stream is capturing\nmore lines")
    step, note = cuda.captured(gpu.call)
    assert step == gpu.call and note == "no graph: operation not permitted when stream is capturing"
    assert "replay" not in gpu.log and gpu.log[-1] == "synchronize"


def test_memory_of_a_gpu_is_what_the_allocator_had_beyond_the_start_and_the_results(gpu, cuda):
    gpu.peak = 999

    def call():
        gpu.peak = max(gpu.peak, gpu.memory + 70)
        return [torch.zeros(5, dtype=torch.int32)]

    assert peak_extra(cuda, call) == 50


def test_memory_of_a_whole_process_is_without_what_it_had_before_the_model(gpu, cuda):
    class Serving(Call):
        resident = True

        def step(self):
            gpu.peak = max(gpu.peak, gpu.memory + 70)

        def peak_memory(self):
            return cuda.peak(self.step)

    server = worker.Server("bench.suites.latency", cuda)
    server._tasks["hbert-v1"] = Serving(gpu)
    gpu.memory += 1000  # weights
    assert server.peak_memory("hbert-v1") == {"bytes": 1070}


def test_the_header_names_the_gpu_and_its_clocks(cuda, monkeypatch):
    asked = []

    def smi(command, **_):
        asked.append(command)
        return types.SimpleNamespace(stdout="1980 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 700.00 W, 570.1\n")

    monkeypatch.setattr(device.subprocess, "run", smi)
    told = cuda.describe()
    assert asked[0][0] == "nvidia-smi"
    assert told["device"] == "A GPU" and told["gpu"] == "sm_90, 132 multiprocessors, 80 GiB, last-level cache 3 MiB"
    assert told["clocks"].startswith("clocks.sm 1980 MHz, clocks.max.sm 1980 MHz") and "570.1" in told["clocks"]
    assert told["fp32_products"] == torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    "failure",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 20),
        subprocess.CalledProcessError(9, "nvidia-smi"),
    ],
)
def test_unknown_clocks_are_told_as_unknown(cuda, monkeypatch, failure):
    def fails(*_, **__):
        raise failure

    monkeypatch.setattr(device.subprocess, "run", fails)
    assert cuda.describe()["clocks"] == f"unknown (nvidia-smi: {type(failure).__name__})"


def test_a_gpu_that_hides_its_cache_gets_a_large_flush():
    properties = types.SimpleNamespace(**{k: v for k, v in vars(PROPERTIES).items() if k != "L2_cache_size"})
    assert "last-level cache 128 MiB" in Cuda(Gpu(properties), "cpu").describe()["gpu"]


@pytest.mark.parametrize("version, reason", [(None, "is built without CUDA"), ("13.0", "sees none")])
def test_no_device_is_told_before_anything_is_started(version, reason, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(session, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        run.main(["--device", "cuda", "--out", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "no CUDA device: torch" in said and reason in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        open_device.__wrapped__("cuda")


def test_the_device_reaches_workers_and_header(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(device, "missing", lambda name: None)
    monkeypatch.setattr(session, "run", lambda plans, setup, report, save: seen.append((setup, report.about)))
    run.main(["--device", "cuda", "--heap", "none", "--out", str(tmp_path)])
    ((setup, about),) = seen
    assert (setup.device, setup.heap) == ("cuda", "none") and about["device"] == "cuda"


def test_a_cpu_is_always_there():
    assert missing("cpu") is None and isinstance(open_device("cpu"), Cpu) and open_device("cpu").isa is None


class Call(Task):
    """A call of a millisecond; `flushed` and `capturable` as given."""

    def __init__(self, gpu, flushed=False, capturable=False):
        self._gpu, self.flushed, self.capturable = gpu, flushed, capturable

    def step(self):
        self._gpu.call()

    def check(self):
        return 0.0, 1.0

    def traits(self):
        return {"isa": "sm_90", "backend": "triton"}


@pytest.fixture
def server_with(cuda, gpu):
    def made(**traits):
        server = worker.Server("bench.suites.latency", cuda)
        server._tasks["hbert-v1"] = Call(gpu, **traits)
        return server

    return made


def test_a_short_call_is_replaced_by_its_graph(gpu, server_with):
    server = server_with(capturable=True)
    estimate = server.estimate("hbert-v1")
    assert estimate == {"seconds": pytest.approx(0.001), "untimed": 3, "traits": {"backend": "triton, graph"}}
    gpu.log.clear()
    assert len(server.run("hbert-v1", calls=7)["seconds"]) == 7
    assert gpu.log.count("replay") == 7 + 3 and "call" not in gpu.log


def test_the_row_says_why_a_call_has_no_graph(gpu, server_with):
    gpu.capture_error = RuntimeError("a host read")
    estimate = server_with(capturable=True).estimate("hbert-v1")
    assert estimate["traits"] == {"backend": "triton, no graph: a host read"}


def test_a_long_call_and_one_that_must_not_be_are_not_captured(gpu, server_with, monkeypatch):
    assert server_with(capturable=False).estimate("hbert-v1")["traits"] == {}
    monkeypatch.setattr(worker, "SMALL", 0.0005)
    assert server_with(capturable=True).estimate("hbert-v1")["traits"] == {}
    assert "capture" not in gpu.log


def test_cold_calls_are_never_grouped(gpu, server_with):
    server = server_with(flushed=True)
    server.estimate("hbert-v1")
    gpu.log.clear()
    seconds = server.run("hbert-v1", calls=2 * worker.SAMPLES)["seconds"]
    assert len(seconds) == gpu.log.count("event") / 2 == 2 * worker.SAMPLES


@pytest.mark.parametrize("op", NAMES)
def test_a_cold_kernel_has_one_set_of_buffers_where_the_cache_can_be_emptied(op, cuda):
    flags = ["--suite", "kernels", "--ops", op, "--dtype", "fp32", "--shapes", "1x1024"]
    (plan,) = run.plan(run.parser().parse_args(flags))
    cold = Subject(next(case for case in plan.cases if case.name.endswith("/dram")), cuda)
    assert cold.turns == 1 and cold.flushed
    assert Kernel(cold, next(iter(cold.problem.candidates))).flushed


def test_a_cold_kernel_takes_turns_where_it_cannot():
    (plan,) = run.plan(run.parser().parse_args(["--suite", "kernels", "--ops", "layer_norm", "--shapes", "1x1024"]))
    subject = Subject(plan.cases[0], Cpu())
    assert subject.turns > 1 and not subject.flushed


def test_ops_of_cpus_are_left_out_elsewhere():
    flags = ["--suite", "kernels", "--device", "cuda"]
    (plan,) = run.plan(run.parser().parse_args(flags))
    assert {case.params["op"] for case in plan.cases} == set(NAMES) - set(ON_CPU_ONLY)
    with pytest.raises(ValueError, match="--ops: int8_linear runs on CPUs only, not on --device cuda"):
        run.plan(run.parser().parse_args([*flags, "--ops", "layer_norm,int8_linear"]))
