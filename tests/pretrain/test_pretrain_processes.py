"""Two gloo processes train as one does."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from pretrain_helpers import Process, metrics, record, run_process
from safetensors.torch import load_file

from hbert.pretrain import budget, trainer
from hbert.pretrain.checkpoint import checkpoints

# Two accumulation passes of unequal size in each process, a batch ramp, no dropout: its masks are drawn per process.
OPTIONS = {"max_steps": 6, "batch_size": 7, "accumulate": 2, "ramp_start": 4, "ramp_fraction": 0.5, "dropout": 0.0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_both(words, folder, die_at=(None, None), before=None):
    """Two processes with the variables that torchrun sets; each may be told to die, or what to call before it runs."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [
        Process(words, folder / f"rank{rank}.log", environment=environment, die_at=moment, before=before)
        for rank, (environment, moment) in enumerate(zip(ranks, die_at, strict=True))
    ]


# Muon's iteration runs in bfloat16 on some processors: the last place is .4% of an entry.
@pytest.mark.parametrize(("optimizer", "atol", "rtol"), [("adamw", 1e-5, 1e-5), ("muon", 3e-4, 1e-3)])
def test_two_processes_give_the_weights_of_one(words, tmp_path, optimizer, atol, rtol):
    one, two = tmp_path / "one", tmp_path / "two"
    options = {**OPTIONS, "optimizer": optimizer}
    status, output = run_process(words(**options, out=one), tmp_path / "one.log")
    assert status == 0, output
    results = [process.wait() for process in start_both(words(**options, out=two), tmp_path)]
    assert [status for status, _ in results] == [0, 0], results
    # Only the first of them speaks.
    assert "finished after 6 steps" in results[0][1] and "finished" not in results[1][1]
    assert record(two)["processes"] == 2
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, tensor in weights.items():
        # Of 6 steps of up to 2e-3. The gradient of a key's bias is 0 but for rounding, which Adam enlarges.
        allowed = max(atol, 1e-4) if "qkv.bias" in name else atol
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=allowed)
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert [line[key] for key in ("kind", "step", "tokens")] == [other[key] for key in ("kind", "step", "tokens")]
        np.testing.assert_allclose(line["loss"], other["loss"], rtol=rtol)


def times_of_its_own():
    """Each process believes in its own times; by those of the second one there is no room for a single step."""
    slower = 100 if os.environ["RANK"] == "1" else 1
    seconds = iter([0.5 * slower, 0.25 * slower])  # of a full batch, of the first one of the ramp

    def measured(run_step, agree, patience):
        run_step()
        return budget.StepTime(next(seconds), 30, 30)

    trainer.measure_step = measured


def test_a_budget_with_a_ramp_is_that_of_the_first_process(words, out, tmp_path):
    options = {
        "max_steps": None,
        "budget": "3s",
        "batch_size": 8,
        "ramp_start": 4,
        "ramp_fraction": 0.5,
        "log_every": 1,
    }
    results = [process.wait() for process in start_both(words(**options), tmp_path, before=times_of_its_own)]
    assert [status for status, _ in results] == [0, 0], results
    # 4 blocks take .25 s, 8 take .5 s: these 7 steps 2.875 s, and 8 would take 3.375.
    sizes = [4, 5, 6, 7, 8, 8, 8]
    entry = record(out)
    assert entry["max_steps"] == 7 and entry["step_seconds"] == 0.5 and entry["processes"] == 2
    assert entry["plan"]["calibration"]["ramp_start"] == {"seconds": 0.25, "clean": 30, "measured": 30}
    trained = [line["tokens"] for line in metrics(out) if line["kind"] == "train"]
    assert trained == [32 * sum(sizes[: step + 1]) for step in range(7)]


def test_a_signal_to_one_process_stops_both_at_the_same_step(words, out, tmp_path):
    # The first process is told, too, as torchrun does, while it writes the checkpoint of that step, its third.
    tell = ("hbert.pretrain.engine", "Engine._seed_dropout", 4, signal.SIGTERM)
    tell_first = ("hbert.pretrain.checkpoint", "write_model", 3, signal.SIGTERM)
    results = [process.wait() for process in start_both(words(), tmp_path, [tell_first, tell])]
    assert [status for status, _ in results] == [143, 143], results
    assert "--resume" in results[0][1] and "--resume" not in results[1][1]
    assert checkpoints(out)[-1].name == "step-00000004" and record(out)["status"] == "interrupted"
    # Taken up again, they end with the bytes of two that were left alone.
    for others in (words(resume=True), words(out=tmp_path / "alone")):
        results = [process.wait() for process in start_both(others, tmp_path)]
        assert [status for status, _ in results] == [0, 0], results
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()


# One rank asks to stop in step 4; the checkpoint of that step takes longer than torchrun takes to see who has left.
SLOW_SAVE = """
import os, signal, sys, time
import torch
from hbert.cli import main
from hbert.pretrain import engine, loop

step, save = engine.Engine.step, loop.save_checkpoint

def told(self, number, *args):
    if number == 3 and os.environ["RANK"] == "1":
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        print("waits for the others for", backend.options._timeout)
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, number, *args)

def slow(out, number, *args):
    time.sleep(5 if number == 4 else 0)
    return save(out, number, *args)

engine.Engine.step, loop.save_checkpoint = told, slow
try:
    status = main(sys.argv[1:])
finally:
    if os.environ["RANK"] == "1":
        print("leaves behind", sorted(os.listdir(os.environ["CHECKPOINTS"])))
sys.exit(status)
"""


def test_under_torchrun_nobody_leaves_before_the_checkpoint_is_there(words, out, tmp_path):
    script = tmp_path / "slow_save.py"
    script.write_text(SLOW_SAVE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"CHECKPOINTS": str(out / "checkpoints")}
    command = [*launcher, "pretrain", *words()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode != 0 and checkpoints(out)[-1].name == "step-00000004", done.stderr
    assert record(out)["status"] == "interrupted"
    assert "'step-00000004'" in done.stdout.partition("leaves behind")[2]
    assert "waits for the others for 1 day, 0:00:00" in done.stdout


def test_the_first_process_alone_looks_at_the_folder(words, out, tmp_path):
    out.mkdir()
    (out / "mine").touch()
    # The second one would not survive it.
    results = [
        process.wait()
        for process in start_both(words(), tmp_path, [None, ("hbert.pretrain.folder", "check_new", 1, signal.SIGKILL)])
    ]
    assert [status for status, _ in results] == [2, 2], results
    assert all("is not empty" in output and "Traceback" not in output for _, output in results), results
