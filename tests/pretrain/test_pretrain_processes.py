"""Two gloo processes train as one does."""

import signal
import socket

import numpy as np
import torch
from pretrain_helpers import Process, metrics, record, run_process
from safetensors.torch import load_file

from hbert.pretrain.checkpoint import checkpoints

# Two accumulation passes of unequal size in each process, a batch ramp, no dropout: its masks are drawn per process.
OPTIONS = {"max_steps": 6, "batch_size": 7, "accumulate": 2, "ramp_start": 4, "ramp_fraction": 0.5, "dropout": 0.0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_both(words, folder, second_dies_at=None):
    """Two processes with the variables that torchrun sets."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [
        Process(words, folder / f"rank{rank}.log", environment=environment, die_at=die_at)
        for rank, (environment, die_at) in enumerate(zip(ranks, [None, second_dies_at], strict=True))
    ]


def test_two_processes_give_the_weights_of_one(words, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    status, output = run_process(words(**OPTIONS, out=one), tmp_path / "one.log")
    assert status == 0, output
    results = [process.wait() for process in start_both(words(**OPTIONS, out=two), tmp_path)]
    assert [status for status, _ in results] == [0, 0], results
    # Only the first of them speaks.
    assert "finished after 6 steps" in results[0][1] and "finished" not in results[1][1]
    assert record(two)["processes"] == 2
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, tensor in weights.items():
        # Of 6 steps of up to 2e-3. The gradient of a key's bias is 0 but for rounding, which Adam enlarges.
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-4 if "qkv.bias" in name else 1e-5)
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert [line[key] for key in ("kind", "step", "tokens")] == [other[key] for key in ("kind", "step", "tokens")]
        np.testing.assert_allclose(line["loss"], other["loss"], rtol=1e-5)


def test_a_signal_to_one_process_stops_both_at_the_same_step(words, out, tmp_path):
    die_at = ("hbert.pretrain.engine", "Engine._seed_dropout", 4, signal.SIGTERM)
    results = [process.wait() for process in start_both(words(), tmp_path, die_at)]
    assert [status for status, _ in results] == [143, 143], results
    assert "--resume" in results[0][1] and "--resume" not in results[1][1]
    assert checkpoints(out)[-1].name == "step-00000004"
