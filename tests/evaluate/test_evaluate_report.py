"""``hbert report`` on run folders whose curves are known."""

import base64
import json
import struct

import numpy as np
import pytest
from evaluate_helpers import run_info, write_documents, write_run
from html_page import Page
from matplotlib.figure import Figure

from hbert import cli
from hbert.data import TokenCache, load_corpus, ngram_marks, save_tokenizer, train_tokenizer
from hbert.evaluate import marks as marks_module
from hbert.evaluate import summary
from hbert.evaluate.report_command import charts
from hbert.evaluate.run_folder import read_runs
from hbert.reporting.style import THEMES

STEP_TOKENS = 2048


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def evaluation(step, accuracy, loss=3.0, num_masked=1000):
    source = {"loss": loss, "accuracy": accuracy, "num_masked": num_masked}
    return {
        "kind": "eval",
        "step": step,
        "tokens": step * STEP_TOKENS,
        **source,
        "per_source": {"first": source, "se|cond <b>": source},
        "train_seconds": step * 0.75,
    }


def training(step):
    return {"kind": "train", "step": step, "tokens": step * STEP_TOKENS, "loss": 9.0, "accuracy": 0.0, "lr": 1e-3}


@pytest.fixture
def mark(cache):
    return ngram_marks(cache).left_bigram


@pytest.fixture
def make_run(tmp_path, corpus, tokenizer):
    """Writes a run on the corpus of the tests with these accuracies at the steps 10, 20, ..."""

    def make(name, accuracies, info=None, **fields):
        lines = [training(1)]
        for index, accuracy in enumerate(accuracies, 1):
            lines += [training(10 * index), evaluation(10 * index, accuracy, **fields)]
        folder = write_run(tmp_path / name, info or run_info(corpus, tokenizer, 10 * len(accuracies)), lines)
        save_tokenizer(tokenizer, folder)
        return folder

    return make


def drawn(chart):
    """The axes of a chart."""
    figure = Figure()
    chart.draw(figure, THEMES["light"])
    (axes,) = figure.axes
    return axes


def png_size(content):
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_report_of_two_runs(capsys, tmp_path, make_run, cache, mark):
    late = make_run("late", [mark - 0.02, mark, mark + 0.01, mark + 0.05])
    never = make_run("never", [0.0, mark / 2, mark * 0.9, mark], loss=4.0)
    out = tmp_path / "report"
    status, printed, err = run(capsys, "report", late, never, "--out", out)
    assert (status, err) == (0, "")
    stems = [f"{metric}-{axis}" for metric in ("accuracy", "loss") for axis in ("steps", "tokens", "clock")]
    pictures = [f"{stem}{suffix}.png" for stem in stems for suffix in ("", "-dark")]
    texts = ["index.html", "summary.json", "summary.md", "ngram-marks.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(pictures + texts)

    summary = json.loads((out / "summary.json").read_text())
    first, second = summary["runs"]
    assert (first["run"], first["escape_step"], first["escape_tokens"]) == ("late", 30, 30 * STEP_TOKENS)
    assert first["escape_seconds"] == pytest.approx(30 * 0.5)  # steps x calibrated time, not 30 x 0.75
    assert first["tokens_per_second"] == pytest.approx(STEP_TOKENS / 0.75)
    assert first["accuracy"] == pytest.approx(mark + 0.05) and first["bits"] == pytest.approx(3 / np.log(2))
    assert second["escape_step"] is None and second["loss"] == 4.0
    assert [each["step"] for each in first["evaluations"]] == [10, 20, 30, 40]
    assert first["marks"]["trigram"] == pytest.approx(ngram_marks(cache).trigram)
    assert summary["warnings"] == []

    page = Page((out / "index.html").read_text())
    columns, row = page.rows[0], page.row("late")
    shown = dict(zip(columns, row, strict=True))
    assert shown["accuracy"] == f"{mark + 0.05:.4f}" and shown["escape step"] == "30 (15 s)"
    assert (shown["model"], shown["parameters"], shown["budget"]) == ("v1c tiny", "1.23 M", "50 s")
    assert dict(zip(columns, page.row("never"), strict=True))["escape step"] == "-"
    assert page.row("se|cond <b>")[1:] == [f"{mark + 0.05:.4f}", f"{mark:.4f}"]
    assert page.row("late, never")[2] == f"{mark:.4f}"
    assert "| late | v1c tiny |" in (out / "summary.md").read_text()
    assert "late" in printed and str(out / "index.html") in printed


def test_the_curves(tmp_path, make_run, corpus, tokenizer, cache):
    info = run_info(corpus, tokenizer, 30, step_seconds=6.0)
    paths = [
        make_run("one", [0.1, 0.3, 0.2], info, loss=2.5),
        make_run("two", [0.4], run_info(corpus, tokenizer, 30, step_seconds=None)),
    ]
    runs = read_runs(paths)
    found = charts(runs, marks_module.marks_of(runs, tmp_path), ["steps", "tokens", "clock"])
    counted = ngram_marks(cache)
    heights = [counted.unigram, counted.left_bigram, counted.trigram]
    labels = [f"{name} {y:.3f}" for name, y in zip(("unigram", "left bigram", "trigram"), heights, strict=True)]
    positions = {
        "steps": ("steps", [10, 20, 30], 10),
        "tokens": ("training tokens", [10 * STEP_TOKENS, 20 * STEP_TOKENS, 30 * STEP_TOKENS], 10 * STEP_TOKENS),
        "clock": ("clock, minutes", [1.0, 2.0, 3.0], np.nan),
    }
    for metric, values in (("accuracy", ([0.1, 0.3, 0.2], [0.4])), ("loss", ([2.5] * 3, [3.0]))):
        for axis, (label, first, second) in positions.items():
            chart = found.pop(f"{metric}-{axis}")
            assert chart.x_label == label and chart.y_label.startswith(f"held-out {metric}")
            for line, name, x, y in zip(chart.lines, ("one", "two"), (first, [second]), values, strict=True):
                assert line.series.label == name and line.y == y
                np.testing.assert_allclose(line.x, x)
            assert dict(chart.marks) == (dict(zip(labels, heights, strict=True)) if metric == "accuracy" else {})
            axes = drawn(chart)
            across = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
            assert across == list(chart.marks.values())
            texts = {text.get_text(): text.get_position()[1] for text in axes.texts}
            assert texts.items() >= chart.marks.items()
    assert not found


def test_a_dot_where_a_run_escapes(tmp_path, make_run, mark):
    paths = [make_run("late", [mark - 0.02, mark, mark + 0.01, mark + 0.05]), make_run("never", [mark / 2, mark])]
    runs = read_runs(paths)
    for chart in charts(runs, marks_module.marks_of(runs, tmp_path), ["steps"]).values():
        assert [line.dots for line in chart.lines] == [[2], []]
        dots = [line for line in drawn(chart).lines if line.get_marker() == "o"]
        assert [(list(dot.get_xdata()), list(dot.get_ydata())) for dot in dots] == [([30], [chart.lines[0].y[2]])]


def test_no_marks_for_runs_of_different_text(tmp_path, make_run, corpus, tokenizer):
    other = load_corpus(text=[write_documents(tmp_path / "3.txt", 3)])
    runs = read_runs([make_run("one", [0.1]), make_run("two", [0.1], run_info(other, tokenizer, 10))])
    assert not charts(runs, marks_module.marks_of(runs, tmp_path), ["steps"])["accuracy-steps"].marks


def test_pictures_are_inline_and_the_page_needs_nothing_else(capsys, tmp_path, make_run):
    out = tmp_path / "report"
    assert run(capsys, "report", make_run("one", [0.1, 0.2]), "--out", out, "--x", "steps")[0] == 0
    html = (out / "index.html").read_text()
    page = Page(html)
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset")]
    stems = ["accuracy-steps", "loss-steps"]
    files = [out / f"{stem}{suffix}.png" for stem in stems for suffix in ("-dark", "")]
    prefix = "data:image/png;base64,"
    assert [base64.b64decode(value.removeprefix(prefix), validate=True) for value in sources] == [
        file.read_bytes() for file in files
    ]
    for light, dark in zip(files[1::2], files[::2], strict=True):
        assert png_size(light.read_bytes()) == png_size(dark.read_bytes())
        assert png_size(light.read_bytes())[0] == 864 and light.read_bytes() != dark.read_bytes()
    page.check_self_contained()
    page.check_figures()
    assert ("meta", "name", "viewport") in page.attributes


def test_marks_are_kept_and_not_counted_again(capsys, tmp_path, make_run, text_files, monkeypatch):
    folder, out = make_run("one", [0.1, 0.2]), tmp_path / "report"
    assert run(capsys, "report", folder, "--out", out, "--x", "clock")[0] == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(marks_module, "ngram_marks", lambda cache: 1 / 0)
    for path in text_files:
        path.unlink()
    assert run(capsys, "report", folder, "--out", out, "--x", "clock")[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_a_report_without_the_text_says_so(capsys, tmp_path, make_run, text_files):
    folder, out = make_run("one", [0.1, 0.9]), tmp_path / "report"
    for path in text_files:
        path.unlink()
    status, printed, _ = run(capsys, "report", folder, "--out", out, "--x", "steps")
    assert status == 0 and "No n-gram marks: no such text file" in printed
    (row,) = json.loads((out / "summary.json").read_text())["runs"]
    assert row["marks"] is None and row["escape_step"] is None and row["accuracy"] == 0.9
    assert "No n-gram marks" in Page((out / "index.html").read_text()).text


@pytest.mark.parametrize("kept", ["path", "name"])
def test_a_run_without_a_tokenizer_file_has_its_token_cache(capsys, tmp_path, make_run, corpus, tokenizer, cache, kept):
    info = run_info(corpus, tokenizer, 30, token_cache=str(cache.path if kept == "path" else cache.path.name))
    folder, out = make_run("one", [0.1], info), tmp_path / "report"
    (folder / "tokenizer.json").unlink()
    assert run(capsys, "report", folder, "--out", out, "--x", "steps")[0] == 0
    (row,) = json.loads((out / "summary.json").read_text())["runs"]
    assert row["marks"]["left_bigram"] == ngram_marks(cache).left_bigram


def test_the_clock_under_a_batch_ramp(tmp_path, make_run, corpus, tokenizer):
    """Ten steps of 2, 3, 4, ... blocks: a step takes 0.1 s for each block and 0.3 s besides."""
    blocks = list(range(2, 8)) + [8] * 4
    info = run_info(corpus, tokenizer, 10, step_seconds=1.1, plan={"calibration": {"ramp_start": {"seconds": 0.5}}})
    info["settings"] |= {"ramp_start": 2, "batch_size": 8, "block_size": 32}
    (found,) = read_runs([make_run("ramp", [0.1], info)])
    for step in (1, 4, 10):
        expected = sum(0.3 + 0.1 * count for count in blocks[:step])
        assert found.info.clock(step, 32 * sum(blocks[:step])) == pytest.approx(expected)


def test_a_run_of_a_number_of_steps_has_no_clock_before_its_end(capsys, tmp_path, make_run, corpus, tokenizer):
    folder = make_run("one", [0.1, 0.9], run_info(corpus, tokenizer, 30, step_seconds=None))
    out = tmp_path / "report"
    status, printed, _ = run(capsys, "report", folder, make_run("two", [0.1, 0.9]), "--out", out, "--x", "clock")
    assert status == 0 and "No curve against the clock of one" in printed
    text = " ".join(Page((out / "index.html").read_text()).text.split())
    assert "a run without a calibration (--max-steps), the median of its own steps" in text
    first, second = json.loads((out / "summary.json").read_text())["runs"]
    assert first["clock_seconds"] is None and second["clock_seconds"] == 10
    assert "20" in Page((out / "index.html").read_text()).row("one")


def test_text_that_has_changed_gives_no_marks(capsys, tmp_path, make_run, text_files):
    folder = make_run("one", [0.1])
    write_documents(text_files[0], seed=9)
    _, printed, _ = run(capsys, "report", folder, "--out", tmp_path / "report", "--x", "steps")
    assert "the text or the tokenizer of one is no longer the one it was trained with" in printed


def test_runs_that_cannot_be_compared(capsys, tmp_path, make_run, corpus, tokenizer, mark):
    other = load_corpus(text=[write_documents(tmp_path / "3.txt", 3)])
    other_tokenizer = train_tokenizer(other, 80)
    folder = make_run("two", [0.1, 0.99], run_info(other, other_tokenizer, 30), num_masked=77)
    save_tokenizer(other_tokenizer, folder)
    out = tmp_path / "report"
    status, printed, _ = run(capsys, "report", make_run("one", [0.1, 0.99]), folder, "--out", out, "--x", "steps")
    assert status == 0
    text = Page((out / "index.html").read_text()).text
    for warning in (
        "different tokenizers: their loss and accuracy are not comparable",
        "different text",
        "different masked tokens (77, 1,000 of them), through another --eval-blocks or --block-size",
        "Not finished: two (step 20 of 30)",
    ):
        assert warning in text and warning in printed
    rows = json.loads((out / "summary.json").read_text())["runs"]
    found = [row["marks"]["left_bigram"] for row in rows]
    assert found == [pytest.approx(mark), ngram_marks(TokenCache.build(other, other_tokenizer)).left_bigram]
    assert [row["finished"] for row in rows] == [True, False]


def test_runs_of_the_same_name_are_told_apart(capsys, tmp_path, make_run):
    paths = [make_run(name, [0.1]) for name in ("a/run", "b/run")]
    assert run(capsys, "report", *paths, "--out", tmp_path / "report", "--x", "steps")[0] == 0
    rows = json.loads((tmp_path / "report" / "summary.json").read_text())["runs"]
    assert [row["run"] for row in rows] == [str(path) for path in paths]


def test_a_run_that_is_writing_and_one_that_diverged(capsys, tmp_path, make_run):
    folder = make_run("one", [0.1, 0.2], loss=float("nan"))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval", "st')
    out = tmp_path / "report"
    assert run(capsys, "report", folder, "--out", out, "--x", "steps")[0] == 0
    (row,) = json.loads((out / "summary.json").read_text(), parse_constant=lambda name: 1 / 0)["runs"]
    assert row["step"] == 20 and row["loss"] is None


def test_counts_have_the_unit_of_what_is_shown():
    shown = {
        None: "-",
        999: "999",
        999.6: "1 k",
        999_424: "999 k",
        999_680: "1 M",
        1_234_567: "1.23 M",
        999_600_000: "1 B",
        2.5e12: "2.5e+03 B",
    }
    assert {value: summary._count(value) for value in shown} == shown


def no_run(folder):
    (folder / "run.json").unlink()


def no_evaluation(folder):
    (folder / "metrics.jsonl").write_text(json.dumps(training(1)) + "\n")


def no_metrics(folder):
    (folder / "metrics.jsonl").unlink()


def broken_line(folder):
    (folder / "metrics.jsonl").write_text('{"kind": "eval", "step": 3}\n')


def not_json(folder):
    (folder / "run.json").write_text("{")


def foreign(folder):
    (folder / "run.json").write_text("[1]")


@pytest.mark.parametrize("spoil", [no_evaluation, no_metrics])
def test_a_run_that_has_just_begun_is_left_out(capsys, tmp_path, make_run, spoil):
    good, young, out = make_run("good", [0.1]), make_run("young", [0.1]), tmp_path / "report"
    spoil(young)
    status, _, err = run(capsys, "report", young, "--out", out)
    assert status == 2 and f"{young}: no evaluation yet, nothing to report" in err and not out.exists()
    status, printed, err = run(capsys, "report", young, good, "--out", out, "--x", "steps")
    assert status == 0 and err == f"hbert: warning: {young} has no evaluation yet and is left out\n"
    assert [row["run"] for row in json.loads((out / "summary.json").read_text())["runs"]] == ["good"]
    assert "young" not in printed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_run, "is not a run folder: it has no run.json"),
        (broken_line, "line 1 is not a metrics line"),
        (not_json, "is not from hbert pretrain"),
        (foreign, "is not from hbert pretrain"),
    ],
)
def test_folders_that_cannot_be_reported(capsys, tmp_path, make_run, spoil, message):
    good, bad = make_run("good", [0.1]), make_run("bad", [0.1])
    spoil(bad)
    status, _, err = run(capsys, "report", good, bad, "--out", tmp_path / "report")
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_bad_arguments(capsys, tmp_path, make_run):
    folder = make_run("one", [0.1])
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([folder, f"{folder}/."], "a run is given twice"),
        ([tmp_path / "nowhere"], "is not a run folder"),
        ([folder, "--out", tmp_path / "file"], "cannot write the report"),
    ):
        status, _, err = run(capsys, "report", *arguments)
        assert status == 2 and message in err and err.count("\n") == 1
