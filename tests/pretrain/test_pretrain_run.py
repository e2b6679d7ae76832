"""The command from end to end, in this process: the run folder, and what it refuses."""

import errno
import json
import math
import os
import resource
import shutil
import struct

import pytest
import torch
from pretrain_helpers import files_of, metrics, record, write_cycles
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hbert.evaluate.held_out import evaluate
from hbert.pretrain import budget, command, engine, optimizers, trainer
from hbert.pretrain.checkpoint import checkpoints


def test_the_run_folder(finished, cache):
    out, stdout, stderr = finished
    assert stdout.startswith("finished after 12 steps, 1,536 tokens: held-out loss ")
    assert "v1c 2x32x2, " in stderr and "step 12/12" in stderr
    entry = record(out)
    assert entry["status"] == "finished" and entry["step"] == entry["max_steps"] == 12 and entry["dtype"] == "fp32"
    assert entry["recipe"]["name"] == "budget" and entry["recipe"]["dropout"] == 0.1
    assert entry["model"]["layer_types"] == ["linear_attention", "full_attention"]
    assert entry["corpus"]["fingerprint"] == cache.meta["corpus"]
    assert entry["tokenizer"] == {"sha256": cache.meta["tokenizer_sha256"], "vocab_size": 150}
    assert set(entry["times"]) == {"data", "training", "evaluation", "checkpoints"}
    assert entry["step_seconds"] > 0 and entry["software"]["torch"] == torch.__version__
    assert [path.name for path in checkpoints(out)] == ["step-00000009", "step-00000012"]


def test_the_command_keeps_its_heap(pretrain, out, monkeypatch):
    kept = []
    monkeypatch.setattr(command, "keep_heap", lambda: kept.append(out.exists()))
    assert pretrain(max_steps=1)[0] == 0 and kept == [False]


def test_metrics(finished, cache):
    out, *_ = finished
    lines = metrics(out)
    assert [(line["kind"], line["step"]) for line in lines] == [
        *[("train", 2), ("train", 4), ("eval", 5), ("train", 6), ("train", 8), ("train", 10), ("eval", 10)],
        *[("train", 12), ("eval", 12)],
    ]
    train = {"kind", "step", "tokens", "loss", "accuracy", "lr", "grad_norm", "step_seconds", "train_seconds"}
    evaluation = {"kind", "step", "tokens", "loss", "accuracy", "mask_accuracy", "num_masked", "per_source"}
    evaluation |= {"train_seconds"}
    for line in lines:
        assert set(line) == (train if line["kind"] == "train" else evaluation)
        assert line["tokens"] == line["step"] * 4 * 32
    assert [line["train_seconds"] for line in lines] == sorted(line["train_seconds"] for line in lines)
    assert lines[-1] == record(out)["result"]


def test_every_step_has_the_learning_rate_of_the_schedule(pretrain, out, monkeypatch):
    def step(self, factor):
        original(self, factor)
        used.append([group["lr"] for group in self._groups()])

    original, used = optimizers.Optimizers.step, []
    monkeypatch.setattr(optimizers.Optimizers, "step", step)
    assert pretrain(warmup=0.3, log_every=1)[0] == 0
    # Four steps towards the peak, then down to 0 over the other eight.
    factors = [1 / 5, 2 / 5, 3 / 5, 4 / 5, *(left / 8 for left in range(8, 0, -1))]
    expected = pytest.approx([0.002 * factor for factor in factors])
    assert [rates[0] for rates in used] == expected
    # Two groups of AdamW, and Muon's, whose peak is .01.
    assert all(rates == pytest.approx([rates[0], rates[0], 5 * rates[0]]) for rates in used)
    assert [line["lr"] for line in metrics(out) if line["kind"] == "train"] == expected


def test_the_result_loads_with_the_auto_classes(finished, cache):
    out, *_ = finished
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 150 and tokenizer.mask_token_id == cache.mask_id
    found = evaluate(model, cache, 32, batch_size=4, max_blocks=4)
    last = metrics(out)[-1]
    assert found.loss == pytest.approx(last["loss"], rel=1e-6) and found.num_masked == last["num_masked"]


@pytest.mark.parametrize("arch", ["v1", "bert"])
def test_the_tokenizer_knows_the_models_positions(pretrain, out, arch):
    assert pretrain(arch=arch, max_steps=1, set="max_position_embeddings=48")[0] == 0
    assert AutoTokenizer.from_pretrained(out).model_max_length == 48


# Paths, and what a run can do without: how it was timed and how often it was saved.
NOT_ON_THE_CARD = {"data", "tokenizer", "init_from", "calibration", "step_seconds", "save_every"}


def test_the_model_card_defines_the_run(pretrain, out, text):
    assert pretrain(eval_every=None, log_every=None)[0] == 0
    card = (out / "README.md").read_text()
    entry = record(out)
    assert f"**{entry['result']['accuracy']:.4f}**" in card and "12 steps" in card
    assert entry["corpus"]["fingerprint"] in card and entry["tokenizer"]["sha256"][:16] in card and "text.txt |" in card
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in card.splitlines() if line.startswith("|")}
    recipe = {name: value for name, value in entry["recipe"].items() if name not in ("name", "model")}
    settings = {name: value for name, value in entry["settings"].items() if not name.startswith("model.")}
    # What was left to the run is on the card as it was decided.
    settings |= {name: value for name, value in entry["plan"].items() if name in settings}
    for facts in (settings, recipe, entry["model"], entry["plan"], entry["machine"], entry["software"]):
        for name, value in facts.items():
            shown = value if isinstance(value, str) else json.dumps(value)
            assert name in NOT_ON_THE_CARD or (name, shown) in rows, name
    assert {("recipe_name", "budget"), ("compile", "false"), ("recipe_corpus", "null"), ("processes", "1")} <= rows
    assert {name for name, _ in rows} >= {"revision", "cpu_capability", "time: training"}
    # Where it lay is nobody's business.
    assert str(text.parent) not in card


def test_events(finished):
    out, *_ = finished
    (file,) = (out / "tensorboard").iterdir()
    content, position, records = file.read_bytes(), 0, 0
    while position < len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        position += length + 16
        records += 1
    # The version, twice, and the step from which these are valid; then six lines of training with six numbers and three
    # evaluations with four.
    assert records == 3 + 6 * 6 + 3 * 4
    assert b"eval/accuracy" in content and b"train/lr" in content


def test_without_tensorboard(pretrain, out, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    status, _, stderr = pretrain(max_steps=2)
    assert status == 0 and "tensorboard is not installed" in stderr
    assert not (out / "tensorboard").exists()


def test_a_run_learns(pretrain, out, tmp_path):
    text = write_cycles(tmp_path / "cycles.txt")
    model = {"arch": "additive-c", "size": "1x64x2", "set": ["init=magneto", "initializer_range=0.2"]}
    training = {"max_steps": 140, "lr": 1e-2, "dropout": 0.0, "batch_size": 16, "eval_every": 20, "eval_blocks": 32}
    status, *_ = pretrain(data=str(text), **model, **training)
    accuracy = [line["accuracy"] for line in metrics(out) if line["kind"] == "eval"]
    assert status == 0 and accuracy[0] < 0.3 and accuracy[-1] > 0.6
    losses = [line["loss"] for line in metrics(out) if line["kind"] == "train"]
    assert losses[-1] < losses[0] / 2


def test_a_budget_becomes_steps_once(pretrain, out, monkeypatch):
    def measured(run_step, agree, patience):
        assert patience == 3 / 4
        run_step()
        return budget.StepTime(0.5, 3, 90)

    monkeypatch.setattr(trainer, "measure_step", measured)
    status, stdout, stderr = pretrain(max_steps=None, budget="3s", eval_every=None, log_every=None)
    assert status == 0 and stdout.startswith("finished after 6 steps")
    assert "only 3 of 90 calibration steps were undisturbed" in stderr
    entry = record(out)
    assert entry["software"]["optimizers"] in ("AdamW, Muon", "AdamW, Float32Muon")
    assert entry["max_steps"] == 6 and entry["step_seconds"] == 0.5 and entry["times"]["calibration"] > 0
    assert entry["plan"]["calibration"]["full"] == {"seconds": 0.5, "clean": 3, "measured": 90}
    assert metrics(out)[-1]["step"] == 6
    weights = (out / "model.safetensors").read_bytes()
    # The calibration itself leaves no trace.
    shutil.rmtree(out)
    pretrain(max_steps=6)
    assert (out / "model.safetensors").read_bytes() == weights


def test_runs_of_any_length_are_evaluated_on_the_same_tokens(pretrain, tmp_path):
    found = {}
    for steps, length in ((1, 32), (9, 32), (1, 48)):
        out = tmp_path / f"{steps}-{length}"
        pretrain(out=out, eval_blocks=None, eval_every=99, max_steps=steps, block_size=length)
        found[steps, length] = record(out)["eval"]["blocks"], metrics(out)[-1]["num_masked"]
    assert found[1, 32] == found[9, 32]
    assert {blocks for blocks, _ in found.values()} == {2048, 1365}  # 65,536 tokens, of which this text has fewer


@pytest.mark.parametrize(("blocks", "steps"), [(8, [2, 4, 6, 8]), (20, [8])])
def test_evaluations_read_no_more_than_training(pretrain, out, blocks, steps):
    # 8 steps of 4 blocks have the tokens of four evaluations of 8, and of one of 20.
    assert pretrain(size="1x32x2", max_steps=8, eval_every=None, eval_blocks=blocks)[0] == 0
    assert [line["step"] for line in metrics(out) if line["kind"] == "eval"] == steps


def test_a_measured_budget(pretrain, out):
    # 0.3 s of steps that take a few milliseconds each, on whatever machine this is.
    status, *_ = pretrain(max_steps=None, budget="0.3s", eval_every=None, log_every=None, size="1x32x2")
    entry = record(out)
    assert status == 0 and entry["max_steps"] == int(0.3 / entry["step_seconds"])
    # As many steps as there are in a quarter of it, or half where the machine is busy.
    found = entry["plan"]["calibration"]["full"]
    assert 1 <= found["measured"] <= budget.MOST_STEPS and found["clean"] <= found["measured"]


@pytest.mark.parametrize(("deadline", "most"), [("0.000001s", 0.0), ("10s", 5.0), ("1h", 7.5)])
def test_a_deadline_ends_the_calibration(pretrain, out, monkeypatch, deadline, most):
    seen = []

    def measured(run_step, agree, patience):
        seen.append(patience)
        return budget.StepTime(30.0, 3, 3)

    monkeypatch.setattr(trainer, "measure_step", measured)
    status, _, stderr = pretrain(max_steps=None, budget="30s", deadline=deadline)
    assert status == 0 and 0.0 <= seen[0] <= most and (seen[0] > 0) == (most > 0)
    assert "the median of 3 in place of 30" in stderr


def test_a_budget_shorter_than_a_step(pretrain, out):
    status, _, stderr = pretrain(max_steps=None, budget="0.00001s")
    assert status == 2 and "is shorter than one step" in stderr and not list(out.iterdir())


def test_a_deadline_stops_saves_and_can_be_resumed(pretrain, out, tmp_path):
    status, stdout, _ = pretrain(deadline="0.000001s")
    assert status == 0 and stdout.startswith("deadline after 1 steps")
    assert record(out)["status"] == "deadline" and (out / "model.safetensors").is_file()
    assert "stopped by the deadline after 1" in (out / "README.md").read_text()
    assert metrics(out)[-1]["kind"] == "eval" and checkpoints(out)[-1].name == "step-00000001"
    status, stdout, stderr = pretrain(resume=True, deadline="10m")
    assert status == 0 and stdout.startswith("finished after 12 steps")
    pretrain(out=tmp_path / "other")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()


def test_a_nan_stops_with_the_last_checkpoint(pretrain, out, monkeypatch):
    def broken(self, step, batch, lr_factor, votes=tuple):
        if step == 7:
            with torch.no_grad():
                self.model.head.dense.bias[2] = math.inf
        return original(self, step, batch, lr_factor, votes)

    original = engine.Engine.step
    monkeypatch.setattr(engine.Engine, "step", broken)
    status, _, stderr = pretrain()
    assert status == 2 and "step 8: loss nan" in stderr and "parameter head.dense.bias" in stderr
    assert "the last good checkpoint is" in stderr and "step-00000006" in stderr
    assert [path.name for path in checkpoints(out)] == ["step-00000003", "step-00000006"]


def test_an_update_to_infinity_is_not_saved(pretrain, out):
    status, _, stderr = pretrain(lr=1e38, weight_decay=1e3, save_every=1, max_steps=3)
    assert status == 2 and "not finite" in stderr
    assert [path.name for path in checkpoints(out)] == ["step-00000000"]


@pytest.mark.parametrize("limit", [60_000, 2_000])
def test_a_full_disk(pretrain, out, limit):
    """The folder of a run is there, then files cannot grow beyond the limit."""
    pretrain(deadline="0.000001s")
    before = files_of(out / "checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status, _, stderr = pretrain(resume=True, deadline="10m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "--resume" in stderr and "Traceback" not in stderr
    assert files_of(out / "checkpoints") == before
    status, stdout, _ = pretrain(resume=True, deadline="10m")
    assert status == 0 and stdout.startswith("finished after 12 steps")


def test_a_cache_without_room(pretrain, out, monkeypatch, tmp_path):
    monkeypatch.setenv("HBERT_CACHE", str(tmp_path / "cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        status, _, stderr = pretrain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and f"the cache {tmp_path / 'cache'} cannot be used: " in stderr
    assert "make room, or set $HBERT_CACHE" in stderr and "--resume" not in stderr and not list(out.iterdir())


def test_a_disk_that_is_full_before_the_run_began(pretrain, out, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "prepare_text", full)
    status, _, stderr = pretrain()
    assert status == 2 and f"{out}: [Errno 28] No space left on device; make room" in stderr
    assert "--resume" not in stderr


def test_a_folder_that_is_not_empty(finished, pretrain, tmp_path):
    out, *_ = finished
    before = files_of(out)
    status, _, stderr = pretrain()
    assert status == 2 and "holds a run: go on with --resume" in stderr and files_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    status, _, stderr = pretrain(out=tmp_path / "mine")
    assert status == 2 and "is not empty" in stderr


def test_a_folder_that_cannot_be_written(pretrain, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        status, _, stderr = pretrain(out=out)
        assert status == 2 and "cannot be written to" in stderr


def test_bad_text(pretrain, out, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_text("a few words only")
    cases = [
        ({"data": str(tmp_path / "none.txt")}, "no such text file"),
        ({"data": str(empty)}, "no training"),
        ({"block_size": 512, "batch_size": 1, "data": str(short)}, "no training|less than one block"),
        ({"block_size": 100_000}, "less than one block of 100000"),
        ({"set": "vocab_size=100"}, "the tokenizer has 150 pieces, vocab_size is 100"),
        ({"tokenizer": str(tmp_path)}, "no tokenizer at"),
    ]
    import re

    for changes, message in cases:
        status, _, stderr = pretrain(**changes)
        assert status == 2 and re.search(message, stderr), stderr
        assert not list(out.iterdir())


def test_too_little_held_out_text(pretrain, out, tmp_path):
    from hbert.data.corpus import is_held_out

    kept = [f"{number} bottles of beer on the wall" for number in range(40)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(line for line in kept if not is_held_out([line])))
    status, _, stderr = pretrain(data=str(path))
    assert status == 2 and "no source has a block of 32 held-out tokens" in stderr


def test_a_compiled_run(pretrain, out, monkeypatch, tmp_path):
    compiled = []

    def compile(model, **options):
        compiled.append(model)
        return original(model, backend="eager")  # generating code takes a minute

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    for folder, options in ((out, {"compile": True}), (tmp_path / "plain", {})):
        assert pretrain(out=folder, max_steps=2, dropout=0.0, **options)[0] == 0
    assert len(compiled) == 1
    assert record(out)["times"]["compile"] > 0 and "compile" not in record(tmp_path / "plain")["times"]
    # The step that compiles leaves no trace.
    losses = [[line["loss"] for line in metrics(folder)] for folder in (out, tmp_path / "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dtype_bf16_trains(pretrain, out):
    assert pretrain(dtype="bf16", max_steps=2)[0] == 0
    assert record(out)["dtype"] == "bf16"
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
