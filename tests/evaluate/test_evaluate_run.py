"""``hbert eval`` and ``hbert report`` on what ``hbert pretrain`` really leaves behind."""

import json

import pytest

from hbert import cli


@pytest.mark.parametrize("arch", ["v1c", "bert"])
def test_a_run_is_evaluated_and_reported_as_it_was_trained(capsys, tmp_path, corpus, arch):
    folder, result, out = tmp_path / "run", tmp_path / "result.json", tmp_path / "report"
    text = ["--data", *(str(file.path) for file in corpus.files)]
    recipe = ["--size", "1x16x2", "--vocab-size", "90", "--block-size", "32", "--batch-size", "4", "--dtype", "fp32"]
    steps = ["--max-steps", "4", "--eval-every", "2", "--eval-blocks", "10000"]
    assert cli.main(["pretrain", "--arch", arch, *text, *recipe, *steps, "--out", str(folder)]) == 0
    evaluations = [
        entry
        for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if entry["kind"] == "eval"
    ]

    assert cli.main(["eval", str(folder), "--dtype", "fp32", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "blocks of 32 tokens" in printed and "not the tokenizer of a run" not in printed
    found = json.loads(result.read_text())
    assert found["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-6)
    assert found["num_masked"] == evaluations[-1]["num_masked"]

    assert cli.main(["report", str(folder), "--out", str(out), "--x", "clock"]) == 0
    report = json.loads((out / "summary.json").read_text())
    (row,) = report["runs"]
    assert report["warnings"] == [] and row["finished"] and row["marks"] is not None
    assert [entry["loss"] for entry in row["evaluations"]] == [entry["loss"] for entry in evaluations]
    assert (row["arch"], row["step"], row["tokens"]) == (arch, 4, 4 * 4 * 32) and row["clock_seconds"] > 0
