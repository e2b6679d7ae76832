"""A run that is killed and taken up again ends as the run left alone; what cannot be taken up."""

import errno
import json
import os
import shutil
import signal

import pytest
from pretrain_helpers import files_of, flags, metrics, record, run_process, write_corpus

from hbert.data import load_corpus, save_tokenizer, train_tokenizer
from hbert.evaluate.run_folder import model_folder
from hbert.pretrain import engine, folder, machine, trainer
from hbert.pretrain.checkpoint import checkpoints

# Moments of one run, in its order: in a step, with a checkpoint half written, behind one, in an evaluation, in a step
# of the resumed run, with the last checkpoint half written, with run.json half written, with the model half written.
MOMENTS = [
    ("hbert.pretrain.engine", "Optimizers.step", 2),
    ("hbert.data.storage", "sync", 24),
    ("hbert.pretrain.checkpoint", "shutil.rmtree", 4),
    ("hbert.evaluate.held_out", "evaluate", 1),
    ("hbert.pretrain.engine", "get_total_norm", 2),
    ("hbert.pretrain.checkpoint", "sha256_file", 8),
    ("hbert.data.storage", "os.replace", 1),
    ("hbert.data.storage", "os.replace", 11),
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


# The fourth file that gets its name, behind three of the first checkpoint, is run.json.
@pytest.mark.parametrize(
    "moment", [("hbert.pretrain.folder", "write_json", 1), ("hbert.data.storage", "os.replace", 4)]
)
def test_killed_before_the_run_began(words, out, cache, tmp_path, moment):
    status, output = run_process(words(max_steps=2), tmp_path / "log", die_at=(*moment, signal.SIGKILL))
    assert status == -signal.SIGKILL, output
    assert bool(list(out.glob(".run.json.*.tmp"))) == (moment[1] == "os.replace") and not (out / "run.json").exists()
    assert list((out / "checkpoints").iterdir()) == [out / "checkpoints" / "step-00000000"]
    status, output = run_process(words(max_steps=2), tmp_path / "log")
    assert status == 0, output
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("failing", ["write_model", "move_files"])
def test_a_run_without_its_last_model_has_not_ended(pretrain, out, monkeypatch, failing):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pretrain(deadline="0.000001s")
    with monkeypatch.context() as patch:
        patch.setattr(folder, failing, full)
        status, _, stderr = pretrain(resume=True, deadline="10m")
    assert status == 2 and "the model could not be written" in stderr
    assert record(out)["status"] == "running" and model_folder(str(out))[0] == str(checkpoints(out)[-1])
    assert pretrain(resume=True, deadline="10m")[0] == 0
    assert record(out)["status"] == "finished" and model_folder(str(out))[0] == str(out)
    assert "stopped by the deadline" not in (out / "README.md").read_text()


def test_resume_refuses_other_settings(finished, pretrain, tmp_path):
    out, *_ = finished
    before = files_of(out)
    status, _, stderr = pretrain(resume=True, lr=1e-4, seed=3)
    assert status == 2
    assert "begun with other settings: lr (was 0.002, now 0.0001), seed (was 0, now 3)" in stderr
    status, _, stderr = pretrain(resume=True, max_steps=20)
    assert status == 2 and "max_steps (was 12, now 20)" in stderr
    assert files_of(out) == before


def test_resume_with_the_same_text_elsewhere(finished, pretrain, text, tmp_path):
    copy = shutil.copyfile(text, tmp_path / text.name)
    status, _, stderr = pretrain(resume=True, data=str(copy))
    assert status == 0, stderr


def test_resume_with_the_same_tokenizer_elsewhere(pretrain, text, out, tmp_path):
    save_tokenizer(train_tokenizer(load_corpus(text=[text]), 150), tmp_path / "first")
    assert pretrain(tokenizer=tmp_path / "first", max_steps=2)[0] == 0
    moved = (tmp_path / "first").rename(tmp_path / "second") / "tokenizer.json"
    status, _, stderr = pretrain(tokenizer=moved, max_steps=2, resume=True)
    assert status == 0, stderr
    moved.write_text(moved.read_text().replace('"quick"', '"@"'))
    before = files_of(out)
    status, _, stderr = pretrain(tokenizer=moved, max_steps=2, resume=True)
    assert status == 2 and "another tokenizer; nothing was changed" in stderr and files_of(out) == before


def test_resume_on_another_machine(pretrain, out, monkeypatch):
    pretrain(deadline="0.000001s")
    before = record(out)
    for about in ("describe", "software"):
        monkeypatch.setattr(machine, about, lambda *device: {"revision": "another", "cpu_capability": "another"})
    status, stdout, stderr = pretrain(resume=True, deadline="10m")
    assert status == 0 and stdout.startswith("finished after 12 steps"), stderr
    # What is recorded is how the run began.
    assert [record(out)[name] for name in ("machine", "software")] == [before[name] for name in ("machine", "software")]


def test_resume_refuses_other_text(finished, pretrain, text):
    out, *_ = finished
    content, before = text.read_text(), files_of(out)
    try:
        write_corpus(text, seed=1)
        status, _, stderr = pretrain(resume=True)
    finally:
        text.write_text(content)
    assert status == 2 and "began with another corpus and another tokenizer" in stderr and files_of(out) == before


def test_resume_of_a_finished_run_restores_its_model(finished, pretrain):
    out, *_ = finished
    weights, lines = (out / "model.safetensors").read_bytes(), metrics(out)
    (out / "model.safetensors").unlink()
    assert pretrain(resume=True)[0] == 0
    assert (out / "model.safetensors").read_bytes() == weights and metrics(out) == lines


def test_resume_from_a_checkpoint_of_weights_alone(finished, pretrain):
    """As checkpoints were before they were model folders."""
    out, *_ = finished
    weights = (out / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoints(out)[-1])
    (newest,) = checkpoints(out)
    state = json.loads((newest / "state.json").read_text())
    for name in set(state["files"]) - {"model.safetensors", "optimizers.pt"}:
        (newest / name).unlink()
        del state["files"][name]
    (newest / "state.json").write_text(json.dumps(state))
    assert pretrain(resume=True)[0] == 0
    assert (out / "model.safetensors").read_bytes() == weights


def test_resume_with_damaged_checkpoints(finished, pretrain):
    out, *_ = finished
    newest = checkpoints(out)[-1]
    (newest / "model.safetensors").write_bytes(b"short")
    status, _, stderr = pretrain(resume=True)
    assert status == 2 and f"{newest} is corrupt" in stderr
    shutil.rmtree(newest)
    status, stdout, stderr = pretrain(resume=True)
    assert status == 0 and "from step 9 to 12" in stderr
    shutil.rmtree(out / "checkpoints")
    status, _, stderr = pretrain(resume=True)
    assert status == 2 and "--resume: no checkpoint" in stderr


def test_resume_with_damaged_entries(finished, pretrain):
    out, *_ = finished
    state, run = checkpoints(out)[-1] / "state.json", out / "run.json"
    for path, name, message in (
        (state, "meter", "is corrupt ('meter'); remove it to go on from the one before it"),
        (state, "files", "is corrupt ('files'); remove it to go on from the one before it"),
        (run, "options", "is not the record of a run of this version of hbert: it has no options"),
        (run, "machine", "is not the record of a run of this version of hbert: it has no machine"),
        (run, "format", "is not the record of a run of this version of hbert: its format is None, not 1"),
    ):
        whole = path.read_text()
        path.write_text(whole.replace(f'"{name}":', f'"{name}s":'))
        status, _, stderr = pretrain(resume=True)
        assert status == 2 and message in stderr
        path.write_text(whole)


@pytest.mark.parametrize(("size", "message"), [(None, "is missing"), (10, "has 10 bytes")])
def test_resume_without_its_lines(finished, pretrain, size, message):
    out, *_ = finished
    (out / "metrics.jsonl").unlink() if size is None else (out / "metrics.jsonl").write_bytes(b"{" * size)
    before = files_of(out)
    status, _, stderr = pretrain(resume=True)
    assert status == 2 and f"metrics.jsonl {message}, but the checkpoint needs its first" in stderr
    assert files_of(out) == before


def test_events_of_an_attempt_that_died_before_its_first_checkpoint(pretrain, out, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def broken(self, step, *args):
        if step == 4:
            raise RuntimeError("the machine died")
        return original(self, step, *args)

    original = engine.Engine.step
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine died"):
        patch.setattr(engine.Engine, "step", broken)
        pretrain(save_every=None, max_steps=50)
    assert pretrain(save_every=None, max_steps=50, resume=True)[0] == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == sorted(set(steps)) and steps[0] == 2


def test_resume_with_a_checkpoint_of_another_run(finished, pretrain, tmp_path):
    out, *_ = finished
    other = tmp_path / "other"
    pretrain(out=other, seed=1)
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(other / "checkpoints", out / "checkpoints")
    status, _, stderr = pretrain(resume=True)
    assert status == 2 and "belongs to another run" in stderr


def test_resume_into_a_folder_that_cannot_be_written(finished, pretrain, monkeypatch):
    out, *_ = finished
    before = files_of(out)

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(args[0] if args else out))

    # The folder, before any work; then files in it.
    for module, name in ((folder, "TemporaryFile"), (folder, "write_json"), (trainer, "MetricsLog")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, denied)
            if name == "TemporaryFile":
                patch.setattr(trainer, "prepare_text", None)
            status, _, stderr = pretrain(resume=True)
        assert status == 2 and f"--out {out} cannot be written to: " in stderr and "Permission denied" in stderr
        assert name == "MetricsLog" or files_of(out) == before
    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="elsewhere"):
        patch.setattr(trainer, "prepare_text", lambda *args: denied("elsewhere"))
        pretrain(resume=True)


def test_resume_without_a_run(pretrain, out):
    for changes, name in (({}, out), ({"out": None, "max_steps": None, "seed": 9}, "runs/v1c-2x32x2-9")):
        status, _, stderr = pretrain(resume=True, **changes)
        assert status == 2 and f"--resume: {name} is not a run folder (no run.json); give it as --out" in stderr
    assert not out.exists()
    out.mkdir()
    (out / "run.json").write_text("{}")
    status, _, stderr = pretrain(resume=True)
    assert status == 2 and "not the record of a run" in stderr
