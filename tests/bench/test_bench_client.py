"""Workers as processes: how they fail, and what becomes of the others."""

import dataclasses
import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from bench import client, machine, session
from bench.client import ENGINE_MODULE, Setup, WorkerError, WorkerProcess
from bench.harness import TIME, Case, Result
from bench.report import Report
from bench.session import SuitePlan
from bench.suites import SUITES
from bench.suites.suite import Wanted

GREETING = {
    "versions": {"torch": "0"},
    "device": {"device": "cpu"},
    "pinning": "p",
    "heap_refused": False,
    "queue_wait": False,
}
LATENCY = SUITES["latency"]


def script(body, greeting=GREETING):
    """A worker of a few lines: greets, then answers each request by `body`, a function `answer(request)`."""
    frame = """
    import json, os, signal, sys, time
    {body}
    print(json.dumps({greeting!r}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
    """
    return textwrap.dedent(frame).format(body=textwrap.dedent(body), greeting=greeting)


def start(source):
    return WorkerProcess([sys.executable, "-c", source], {})


@pytest.fixture
def worker_of():
    started = []

    def begin(body):
        started.append(start(script(body)))
        started[-1].reply()
        return started[-1]

    yield begin
    for worker in started:
        worker.close()


def test_requests_reach_the_worker_and_answers_come_back(worker_of):
    worker = worker_of("answer = lambda request: {'got': request}")
    assert worker.ask("run", calls=3) == {"got": {"do": "run", "calls": 3}}
    assert worker.alive


@pytest.mark.parametrize(
    "body, reason",
    [
        ("def answer(request):\n    sys.exit('the reason')", "exit code 1: the reason"),
        ("def answer(request):\n    os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, most often for lack of memory"),
        ("def answer(request):\n    os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
    ],
)
def test_a_death_is_told_with_its_cause(worker_of, body, reason):
    worker = worker_of(body)
    with pytest.raises(WorkerError, match=reason):
        worker.ask("check")
    with pytest.raises(WorkerError, match="worker"):
        worker.ask("check")
    assert not worker.alive


def test_a_reported_failure_leaves_the_worker_at_work(worker_of):
    worker = worker_of("answer = lambda request: {'failed': 'no'} if request['do'] == 'check' else {}")
    with pytest.raises(WorkerError, match="^no$"):
        worker.ask("check")
    assert worker.ask("run") == {}


def test_a_worker_that_says_nothing_is_ended(worker_of):
    worker = worker_of("answer = lambda request: time.sleep(60)")
    with pytest.raises(WorkerError, match="no answer"):
        worker.ask("check", timeout=0.1)
    assert not worker.alive


def test_a_worker_whose_libraries_do_not_end_ends_with_its_input():
    source = """
    import atexit, time
    from bench import worker
    worker.EXIT_SECONDS = 1
    atexit.register(time.sleep, 600)
    worker.serve(dict, object)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    ended = subprocess.run(command, input="", capture_output=True, cwd=machine.ROOT, text=True, timeout=60, check=False)
    assert ended.stdout == "{}\n" and ended.returncode == -signal.SIGALRM


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
@pytest.mark.parametrize("begin", [f"start_worker({ENGINE_MODULE!r}, Setup([0]), True, False)", "start_exporter()"])
def test_a_worker_at_work_ends_with_a_coordinator_that_is_killed(begin):
    source = f"""
    import os, signal, time
    from bench.client import Setup, start_exporter, start_worker
    worker = {begin}
    worker.reply()
    os.kill(worker._process.pid, signal.SIGSTOP)  # it reads its input no more
    print(worker._process.pid, flush=True)
    time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=machine.ROOT, text=True) as coordinator:
        number = int(coordinator.stdout.readline())
        handle = os.pidfd_open(number)
        coordinator.kill()
    ended, _, _ = select.select([handle], [], [], 30)
    if not ended:
        os.kill(number, signal.SIGKILL)
    os.close(handle)
    assert ended


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_a_worker_whose_coordinator_has_ended_does_not_start():
    command = [sys.executable, client._EXPORTER]
    environment = {**os.environ, client._COORDINATOR: "1"}
    done = subprocess.run(command, env=environment, input="", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == "" and "has ended" in done.stderr


def test_a_worker_whose_coordinator_does_not_read_ends():
    source = """
    import threading, time
    from bench import worker
    worker.EXIT_SECONDS = 1
    threading.Thread(target=time.sleep, args=(600,)).start()
    worker.serve(dict, object)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=machine.ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "{}\n"
        process.stdout.close()
        process.stdin.write('{"do": "run"}\n')
        process.stdin.flush()
        try:
            assert process.wait(60) == -signal.SIGALRM
        finally:
            process.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_what_a_worker_has_started_ends_with_it(worker_of):
    worker = worker_of("answer = lambda request: {'child': __import__('subprocess').Popen(['sleep', '600']).pid}")
    handle = os.pidfd_open(worker.ask("run")["child"])
    worker.close()
    ended, _, _ = select.select([handle], [], [], 30)
    if not ended:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    assert ended


def test_an_interrupted_end_leaves_no_worker(worker_of, monkeypatch):
    def interrupted(self, timeout=None):
        if timeout is not None:
            raise KeyboardInterrupt
        return waited(self)

    waited = subprocess.Popen.wait
    workers = [worker_of("answer = lambda request: time.sleep(60)") for _ in range(2)]
    crew = session.Crew(SuitePlan(LATENCY, (), (), (), 2.0), Setup([0]), Report({}))
    crew._workers = {(str(number),): worker for number, worker in enumerate(workers)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), crew:
        patch.setattr(subprocess.Popen, "wait", interrupted)
    assert not any(worker.alive for worker in workers)


WELL = """
answers = dict(prepare=dict(traits=dict(isa='i', backend='b')), check=dict(error=0, allowed=1),
               estimate=dict(seconds=0.5, untimed=1, traits={}), run=dict(seconds=[0.5], wait=None))
def answer(request):
    return answers[request['do']]
"""
DIES_ONCE = (
    WELL
    + """
def answer(request):
    if request['do'] == 'check' and not os.path.exists(FLAG):
        open(FLAG, 'w').close()
        sys.exit('out of luck')
    return answers[request['do']]
"""
)


def test_a_dead_worker_is_started_anew_for_the_next_case(monkeypatch, tmp_path):
    dying = DIES_ONCE.replace("FLAG", repr(str(tmp_path / "flag")))
    refuses = script("answer = None", {"failed": "RuntimeError: threads are not pinned"})
    sources = iter([script(dying), script(WELL), refuses, script(WELL), script(WELL), script(dying)])
    monkeypatch.setattr(session, "start_worker", lambda module, setup, keep: start(next(sources)))
    cases = tuple(Case("latency", name, "fp32", 1, 7, 7) for name in ("first", "second"))
    plan = SuitePlan(LATENCY, ("hbert-v1", "hbert-v2"), ("hf",), cases, 0.1)
    assert plan.peers == ("hf", "hbert-v1", "hbert-v2", "floor-hbert-v1", "floor-hbert-v2")
    about = dict.fromkeys(("threads", "heap_kept", "torch", "cpu", "git", "date"), "x")
    report = Report(about)
    saved = []
    session.run([plan], Setup([0]), report, lambda: saved.append(len(report.rows)))
    assert [(f.peer, f.case) for f in report.failures] == [("hbert-v2", ""), ("hf", "first")]
    assert "not pinned" in report.failures[0].reason and "out of luck" in report.failures[1].reason
    told = [(row["case"], row["candidate"], row["baseline"]) for row in report.rows if row["metric"] == "latency"]
    assert [one for one in told if not one[1].startswith("floor")] == [
        ("first", "hbert-v1", ""),
        ("second", "hf", "hf"),
        ("second", "hbert-v1", "hf"),
    ]
    assert saved == [4, 4 + 5]
    assert "no schedstat" in report.about["disturbance"]


def test_missing_inputs_fail_their_suite_alone(monkeypatch, tmp_path):
    def no_network(case, folder):
        raise OSError("offline")

    suite = dataclasses.replace(SUITES["throughput"], inputs=no_network)
    cases = tuple(suite.cases(Wanted(((1, 7),), ("bf16",), sizes=("tiny",))))
    plan = SuitePlan(suite, ("hbert-v1",), ("hf",), cases, 2.0)
    report = Report({})
    session.run([plan], Setup([0]), report, lambda: None)
    assert [(f.suite, f.peer, f.reason) for f in report.failures] == [
        ("throughput", "all peers", "no inputs: OSError: offline")
    ]


@pytest.mark.parametrize(
    "heap, keeping",
    [
        ("all", {"hf", "hbert-v1", "floor-hbert-v1"}),
        ("ours", {"hbert-v1", "floor-hbert-v1"}),
        ("none", {"floor-hbert-v1"}),
    ],
)
def test_the_heap_is_kept_by_those_who_are_told_to(heap, keeping, monkeypatch):
    asked = {}

    class Silent:
        alive = True

        def reply(self):
            return GREETING

        def close(self):
            pass

    def begin(module, setup, keep_heap):
        asked[plan.teams[len(asked)]] = keep_heap
        return Silent()

    monkeypatch.setattr(session, "start_worker", begin)
    plan = SuitePlan(SUITES["throughput"], ("hbert-v1",), ("hf",), (), 2.0)
    with session.Crew(plan, Setup([0], heap=heap), Report({})) as crew:
        assert set(crew.ready(plan.peers)) == {"hf", "hbert-v1", "floor-hbert-v1"}
    assert {team for (team,), kept in asked.items() if kept} == keeping


def test_workers_start_for_their_first_case_and_end_behind_their_last(monkeypatch):
    log = []

    class Silent:
        alive = True

        def __init__(self, peer):
            self.peer = peer

        def reply(self):
            return GREETING

        def close(self):
            log.append(f"end {self.peer}")

    def begin(suite, team, setup, keep_heap):
        log.append(f"start {team[0]}")
        return Silent(team[0])

    def measured(case, workers, *_):
        log.append(f"{case.name}: {', '.join(workers)}")
        return Result(case)

    monkeypatch.setattr(session, "_start", begin)
    monkeypatch.setattr(session, "measure", measured)
    cases = [
        Case("throughput", name, "fp32", 2, 9, 18, peers=peers, measures=(TIME,))
        for name, peers in (("one", ("hf", "hbert-v2")), ("two", ("hf", "hbert-v1")))
    ]
    plan = SuitePlan(SUITES["throughput"], ("hbert-v1", "hbert-v2"), ("hf", "hf-compile"), tuple(cases), 2.0)
    monkeypatch.setattr(session, "_with_inputs", lambda plan, *_: list(plan.cases))
    session.run([plan], Setup([0]), Report({}), lambda: None)
    assert log[:3] == ["start hf", "start hbert-v2", "one: hf, hbert-v2"]
    assert log[3:6] == ["end hbert-v2", "start hbert-v1", "two: hf, hbert-v1"]
    assert sorted(log[6:]) == ["end hbert-v1", "end hf"]


@pytest.mark.parametrize("heap, told", [("all", "all"), ("ours", "ours")])
@pytest.mark.parametrize("refused", [False, True])
def test_the_header_tells_of_a_heap_that_cannot_be_kept(heap, told, refused, monkeypatch):
    greeting = {**GREETING, "heap_refused": refused}
    monkeypatch.setattr(session, "start_worker", lambda *_: start(script("", greeting)))
    report = Report({"heap_kept": heap})
    plan = SuitePlan(LATENCY, ("hbert-v1",), ("hf",), (), 2.0)
    with session.Crew(plan, Setup([0], heap=heap), report) as crew:
        crew.ready(plan.peers)
    assert report.about["heap_kept"] == ("none" if refused else told)


PINNING = """
import sys
sys.path.append({root!r})
from bench import machine
import torch
torch.set_num_threads({threads})
torch.zeros(1 << 22).add_(1)
print(machine.check_pinning({cpus}))
"""


@pytest.mark.parametrize("pinned", [True, False])
def test_threads_of_torch_are_seen_one_per_core_or_refused(pinned):
    cpus = machine.cores()[:2]
    source = PINNING.format(root=str(machine.ROOT), threads=len(cpus), cpus=cpus)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    environment |= machine.thread_environment(cpus) if pinned else {}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    told = hasattr(os, "sched_getaffinity")
    if pinned or not told or len(os.sched_getaffinity(0)) == 1:
        assert done.stdout.strip() == (machine.PINNED if told else machine.UNCHECKED), done.stderr
    else:
        assert done.returncode == 1 and "not pinned one per core" in done.stderr


CACHES = {  # two processors of a socket with a third-level cache each for two cores
    0: {"0": ("48K", "0"), "2": ("1024K", "0"), "3": ("32768K", "0-1")},
    1: {"0": ("48K", "1"), "2": ("1024K", "1"), "3": ("32768K", "0-1")},
    2: {"0": ("48K", "2"), "2": ("1024K", "2"), "3": ("16384K", "2-3")},
}


@pytest.mark.parametrize(
    "bound, mebibytes", [({0}, 32), ({0, 1}, 32), ({0, 1, 2}, 48), ({7}, 32), (set(), 32), (None, 32)]
)
def test_the_caches_of_all_cores_that_are_used_count_once(bound, mebibytes, monkeypatch):
    files = {
        f"/sys/devices/system/cpu/cpu{cpu}/cache/index{index}/{name}": f"{value}\n"
        for cpu, caches in CACHES.items()
        for index, values in caches.items()
        for name, value in zip(("size", "shared_cpu_list"), values, strict=True)
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(machine, "pinned_cpus", lambda: bound)
    assert machine.last_level_cache() == mebibytes << 20


def test_pinning_is_refused_when_threads_share_a_core(monkeypatch):
    monkeypatch.setattr(machine, "pinned_cpus", lambda: {0})
    assert machine.check_pinning([0]) == machine.PINNED
    with pytest.raises(RuntimeError, match="not pinned one per core"):
        machine.check_pinning([0, 1])
    monkeypatch.setattr(machine, "pinned_cpus", lambda: None)
    assert machine.check_pinning([0, 1]) == machine.UNCHECKED
