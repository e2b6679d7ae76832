"""``hbert eval`` and ``hbert report`` on what ``hbert pretrain`` really leaves behind."""

import json

import pytest

from hbert import cli
from hbert.pretrain.loop import Training


@pytest.fixture
def words(tmp_path, corpus):
    """The command line of four steps, evaluated and saved after every second one."""
    text = ["--data", *(str(file.path) for file in corpus.files)]
    recipe = ["--size", "1x16x2", "--vocab-size", "90", "--block-size", "32", "--batch-size", "4", "--dtype", "fp32"]
    steps = ["--max-steps", "4", "--eval-every", "2", "--save-every", "2", "--eval-blocks", "10000"]
    return ["pretrain", *text, *recipe, *steps, "--out", str(tmp_path / "run")]


def evaluations_of(run):
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == "eval"]


def evaluated(capsys, tmp_path, folder):
    """What hbert eval prints and writes of a folder."""
    capsys.readouterr()
    result = tmp_path / "result.json"
    assert cli.main(["eval", str(folder), "--dtype", "fp32", "--json", str(result), "--overwrite"]) == 0
    return capsys.readouterr().out, json.loads(result.read_text())


@pytest.mark.parametrize("arch", ["v1c", "bert"])
def test_a_run_is_evaluated_and_reported_as_it_was_trained(capsys, tmp_path, words, arch):
    folder, out = tmp_path / "run", tmp_path / "report"
    assert cli.main([*words, "--arch", arch]) == 0
    evaluations = evaluations_of(folder)

    for model, expected in ((folder, evaluations[1]), (folder / "checkpoints" / "step-00000002", evaluations[0])):
        printed, found = evaluated(capsys, tmp_path, model)
        assert "blocks of 32 tokens" in printed and "not the tokenizer of a run" not in printed
        assert "has not ended" not in printed and found["model"] == str(model)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["num_masked"] == expected["num_masked"]

    assert cli.main(["report", str(folder), "--out", str(out), "--x", "clock"]) == 0
    report = json.loads((out / "summary.json").read_text())
    (row,) = report["runs"]
    assert report["warnings"] == [] and row["finished"] and row["marks"] is not None
    assert [entry["loss"] for entry in row["evaluations"]] == [entry["loss"] for entry in evaluations]
    assert (row["arch"], row["step"], row["tokens"]) == (arch, 4, 4 * 4 * 32) and row["clock_seconds"] > 0


def test_a_run_without_a_model_is_refused(capsys, tmp_path, words, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Training, "_votes", lambda training: (int(training.state.step == 1), 0))
        cli.main(words)
    for config in (tmp_path / "run").glob("checkpoints/*/config.json"):
        config.unlink()  # as checkpoints once were
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    assert "has not ended, and none of its checkpoints is a model; go on with --resume" in capsys.readouterr().err


def test_of_an_interrupted_run_the_newest_checkpoint_is_evaluated(capsys, tmp_path, words, monkeypatch):
    folder = tmp_path / "run"
    # The deadline leaves a model, older than the checkpoint of the signal.
    assert cli.main([*words, "--deadline", "0.000001s"]) == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Training, "_votes", lambda training: (int(training.state.step == 1), 0))
        cli.main([*words, "--resume"])
    printed, found = evaluated(capsys, tmp_path, folder)
    newest = folder / "checkpoints" / "step-00000002"
    assert f"{folder} has not ended: its newest checkpoint, {newest}" in printed
    assert "not the tokenizer of a run" not in printed and found["model"] == str(newest)
    assert cli.main([*words, "--resume", "--deadline", "10m"]) == 0
    assert [entry["step"] for entry in evaluations_of(folder)] == [1, 2, 4]
    assert found["loss"] == pytest.approx(evaluations_of(folder)[1]["loss"], rel=1e-6)
