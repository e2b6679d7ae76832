"""A run that is killed and taken up again ends as the run left alone."""

import signal

import pytest
from pretrain_helpers import files_of, flags, metrics, record, run_process

from hbert.pretrain.checkpoint import checkpoints

# Moments of one run, in its order: in a step, with a checkpoint half written, behind one, in an evaluation, in a step
# of the resumed run, with the last checkpoint half written, with the model half written.
MOMENTS = [
    ("hbert.pretrain.engine", "Optimizers.step", 2),
    ("hbert.data.storage", "sync", 24),
    ("hbert.pretrain.checkpoint", "shutil.rmtree", 4),
    ("hbert.evaluate.held_out", "evaluate", 1),
    ("hbert.pretrain.engine", "get_total_norm", 2),
    ("hbert.pretrain.checkpoint", "sha256_file", 8),
    ("hbert.pretrain.folder", "os.replace", 11),
]


@pytest.fixture(scope="module")
def undisturbed(shared, text):
    from pretrain_helpers import SMALL

    out = shared / "undisturbed"
    words = flags(data=str(text), out=str(out), **SMALL)
    status, output = run_process(words, shared / "undisturbed.log")
    assert status == 0, output
    return out


def comparable(entries):
    timing = ("step_seconds", "train_seconds")
    return [{name: value for name, value in entry.items() if name not in timing} for entry in entries]


def test_killed_at_every_moment_and_resumed(undisturbed, words, out, tmp_path):
    resume = []
    for number, moment in enumerate(MOMENTS):
        log = tmp_path / f"{number}.log"
        status, output = run_process(words() + resume, log, die_at=(*moment, signal.SIGKILL))
        assert status == -signal.SIGKILL, f"{moment}: {output}"
        resume = ["--resume"]
    # Nothing but where and that: the rest comes from the run.
    status, output = run_process(["--resume", "--out", str(out)], tmp_path / "last.log")
    assert status == 0, output
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert comparable(metrics(out)) == comparable(metrics(undisturbed))
    names = {path.name for path in out.rglob("*")} - {path.name for path in (out / "tensorboard").iterdir()}
    others = {path.name for path in (undisturbed / "tensorboard").iterdir()}
    assert names == {path.name for path in undisturbed.rglob("*")} - others
    assert record(out)["status"] == "finished"


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step(undisturbed, words, out, tmp_path, number, expected):
    die_at = ("hbert.pretrain.engine", "Engine._seed_dropout", 8, number)
    status, output = run_process(words(), tmp_path / "log", die_at=die_at)
    assert status == expected
    assert f"hbert pretrain --resume --out {out}" in output
    assert checkpoints(out)[-1].name == "step-00000008"
    assert record(out)["status"] == "interrupted" and not (out / "model.safetensors").exists()
    status, output = run_process(words(resume=True), tmp_path / "log")
    assert status == 0 and "from step 8 to 12 steps" in output
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert comparable(metrics(out)) == comparable(metrics(undisturbed))


def test_killed_before_the_run_began(words, out, tmp_path):
    die_at = ("hbert.pretrain.folder", "write_json", 1, signal.SIGKILL)
    assert run_process(words(max_steps=2), tmp_path / "log", die_at=die_at)[0] == -signal.SIGKILL
    assert files_of(out)
    status, output = run_process(words(max_steps=2), tmp_path / "log")
    assert status == 0, output
