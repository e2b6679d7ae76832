"""Tables of docs/: blocks of pages, kept results, and that the pages say what the results say."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from sample_results import sample_rows, write_record, write_rows, write_sample

from bench import documents, run
from bench.finetuning import report as finetuning
from bench.pretraining import plan, store
from bench.pretraining import report as pretraining
from bench.report.results import read_results
from hbert.errors import HbertError

PAGE = "# A page\n\n<!-- table: one -->\nold\n<!-- end -->\ntext\n<!-- table: two -->\n<!-- end -->\n"
ARGUMENTS = documents.MEASURED["latency-fp32"].arguments
COMMAND = f"python bench/run.py {ARGUMENTS} --strict --out /home/me/results"


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "DOCS", tmp_path)
    monkeypatch.setattr(documents, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(documents, "README", tmp_path / "README.md")
    monkeypatch.setattr(documents, "_IN_BRIEF", "hbert-v2")
    monkeypatch.setattr(documents, "git_revision", lambda checkout: "0123456789ab")
    place = "<!-- table: latency-fp32-avx2 -->\n1\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(place)
    (tmp_path / "inference.md").write_text(f"{place}<!-- table: losses -->\n<!-- end -->\n")
    return tmp_path


def bench_run(folder, code=0, command=COMMAND, **cells):
    """What bench/run.py leaves in a folder."""
    cells = {"git": "0123456789ab", **cells}
    write_rows(folder / "x.csv", [row | cells for row in sample_rows() if row["suite"] == "latency"])
    write_record(folder / "x.json", about={"command": command}, rounds=[{"seconds": [1.0] * 1000}], rows=[])
    return subprocess.CompletedProcess([], code)


def test_blocks_are_filled_and_nothing_else_changes():
    filled = documents.fill(PAGE, {"one": "| new |\n"})
    assert filled == PAGE.replace("old\n", "| new |\n")
    assert documents.fill(filled, {"one": "| new |"}) == filled
    assert documents.fill(PAGE, {"two": "| a |"}) == PAGE.replace("two -->\n", "two -->\n| a |\n")
    assert documents.names(PAGE) == ["one", "two"]


def test_a_block_without_a_place_is_an_error_and_changes_nothing(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(HbertError, match="no lines <!-- table: NAME --> and <!-- end --> for three"):
        documents.rewrite(page, {"one": "new", "three": "new"})
    assert page.read_text() == PAGE
    with pytest.raises(HbertError, match="nowhere.md"):
        documents.rewrite(tmp_path / "nowhere.md", {})


def test_what_is_kept_of_a_run(docs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    bench_run(out)
    kept = documents.keep("latency-fp32", out / "x.csv")
    assert kept == tmp_path / "results" / "latency-fp32-avx2.csv" and kept.read_text() == (out / "x.csv").read_text()
    record = json.loads(kept.with_suffix(".json").read_text())
    assert record["about"]["command"] == f"python bench/run.py {ARGUMENTS}"
    assert set(record) == {"about", "failures", "left_out", "disturbances"}


@pytest.mark.parametrize("of_torch", ["avx2", "avx512", ""])
def test_the_level_of_a_table_is_that_of_ours(of_torch, docs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    bench_run(out)
    rows = [row for row in sample_rows() if row["suite"] == "latency"]
    peers = {row["baseline"] for row in rows}
    levels = [of_torch if row["candidate"] in peers else "neon" for row in rows]
    cells = [row | {"git": "0123456789ab", "isa": isa} for row, isa in zip(rows, levels, strict=True)]
    assert documents.keep("latency-fp32", write_rows(out / "x.csv", cells)).stem == "latency-fp32-neon"


@pytest.mark.parametrize(
    "run, reason",
    [
        ({"git": "0123456789ab-dirty"}, r"those of no commit \(0123456789ab-dirty\)"),
        ({"command": f"{COMMAND} --min-time 9"}, "x.csv is of `python.* --min-time 9`, not of `python bench/run.py"),
    ],
)
def test_what_cannot_be_measured_again_is_not_kept(docs, tmp_path, run, reason):
    out = tmp_path / "out"
    out.mkdir()
    bench_run(out, **run)
    with pytest.raises(HbertError, match=f"latency-fp32 is not kept: .*{reason}"):
        documents.keep("latency-fp32", out / "x.csv")
    assert not (docs / "results").exists()


def test_changed_sources_are_not_measured(docs, monkeypatch, capsys):
    monkeypatch.setattr(documents, "git_revision", lambda checkout: "0123456789ab-dirty")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        documents.main(["--measure", "latency-fp32"])
    assert "commit them first" in capsys.readouterr().err


def test_measuring_rewrites_the_page(docs, monkeypatch):
    def fake(command, cwd, check):
        assert command[1:6] == ["bench/run.py", *documents.MEASURED["latency-fp32"].arguments.split()[:4]]
        return bench_run(documents.Path(command[-1]))

    monkeypatch.setattr(subprocess, "run", fake)
    assert documents.main(["--measure", "latency-fp32"]) == 0
    page = (docs / "inference.md").read_text()
    assert f"`python bench/run.py {ARGUMENTS}`" in page and "| base/1x128 | hbert-v1 |" in page
    assert "2 pinned threads" in page and "2026-01-02" in page
    assert "ct2-int8" in page and "**The machine was busy**" in page
    assert "| base/1x64 fp32 | avx2 | hbert-v2 v ort-fp32 | 0.88 [0.86, 0.91] |" in page.split("table: losses")[1]
    readme = (docs / "README.md").read_text()
    assert "*The machine was busy: 21 of 200 slices" in readme
    assert readme.splitlines()[1:4] == [
        "| case | hbert-v2, ms | against hf | against ort | against ov |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 1x64 fp32 | 31.3 | 1.13 [1.10, 1.16] | **0.88 [0.86, 0.91]** | **0.67 [0.65, 0.69]** |",
    ]


def test_a_page_has_the_losses_of_its_own_tables(docs):
    (docs / "results").mkdir()
    for name, suite in (("latency-fp32", "latency"), ("kernels", "kernels"), ("training-base-ours", "throughput")):
        path = docs / "results" / f"{name}-avx2.csv"
        write_rows(path, [row for row in sample_rows() if row["suite"] == suite])
        write_record(path.with_suffix(".json"))
    found = documents.measured_blocks()
    of_models, of_ops = (found[docs / page]["losses"].splitlines() for page in ("inference.md", "kernels.md"))
    assert "| base/1x64 fp32 | avx2 | hbert-v2 v ort-fp32 | 0.88 [0.86, 0.91] |" in of_models
    assert "| attention.full/1x128/bwd/cache fp32 | avx2 | hbert v compile | 0.70 [0.68, 0.72] |" in of_ops
    assert not any("hbert v compile" in line for line in of_models) and not any(" v ort-" in line for line in of_ops)
    assert "losses" not in found[docs / "results-pretraining.md"]


def test_a_level_that_the_page_does_not_have_gets_a_place(docs, monkeypatch):
    page = docs / "inference.md"
    page.write_text(f"{page.read_text()}text\n")
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: bench_run(documents.Path(command[-1]), isa="avx512_amx")
    )
    for _ in range(2):  # the second time it is there
        assert documents.main(["--measure", "latency-fp32"]) == 0
        assert documents.names(page.read_text()) == ["latency-fp32-avx2", "latency-fp32-avx512_amx", "losses"]
    first, block, rest = page.read_text().split("<!-- table: l")[1:]
    assert first == "atency-fp32-avx2 -->\n1\n<!-- end -->\n\n" and "| base/1x128 | hbert-v1 |" in block
    assert block.endswith("|\n<!-- end -->\n") and rest.endswith("<!-- end -->\ntext\n")


@pytest.mark.parametrize("code", [1, 4])
def test_a_run_that_failed_or_was_disturbed_is_not_kept(docs, monkeypatch, capsys, code):
    monkeypatch.setattr(subprocess, "run", lambda command, **others: bench_run(documents.Path(command[-1]), code))
    before = (docs / "inference.md").read_text()
    with pytest.raises(SystemExit):
        documents.main(["--measure", "latency-fp32"])
    assert f"latency-fp32 is not kept: bench/run.py ended with exit code {code}" in capsys.readouterr().err
    assert (docs / "inference.md").read_text() == before and not (docs / "results").exists()


def test_every_measurement_is_one_that_the_benchmark_takes():
    for name, table in documents.MEASURED.items():
        options = run.parser().parse_args(table.arguments.split())
        if options.checkpoint is None:  # it would have to be there
            run.plan(options)
        places = set(documents.names((documents.DOCS / table.page).read_text()))
        assert {f"{name}-avx2", f"{name}-avx512_bf16"} & places  # or minutes are measured that no page can show


def test_a_table_names_the_model_of_the_processor_where_the_run_knew_it(tmp_path):
    path = write_sample(tmp_path)
    assert "processor that does not exist; " in documents.measured_block(read_results(path))
    about = json.loads(path.with_suffix(".json").read_text())["about"]
    write_record(path.with_suffix(".json"), about=about | {"cpu_model": "25/1/1"})
    assert "processor that does not exist (25/1/1); " in documents.measured_block(read_results(path))


def test_memory_has_a_table(tmp_path):
    found = documents.measured_block(read_results(write_sample(tmp_path)))
    lines = found[found.index("throughput, bf16, peak memory, MiB:") :].splitlines()
    assert lines[2:5] == [
        "| case | hf | hf-compile | hbert-v1 | hbert-v2 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| base/8x128/peak | 1210 | 1105 | 402 | 395 |",
    ]


def test_the_pages_show_the_kept_results():
    found = documents.measured_blocks()
    assert found
    for page, blocks in found.items():
        text = page.read_text()
        assert documents.fill(text, blocks) == text, f"python -m bench.documents rewrites {page.name}"
        assert set(blocks) <= set(documents.names(text))


def test_the_page_of_the_experiments_shows_every_finished_run():
    text, blocks = pretraining.PAGE.read_text(), pretraining.blocks()
    assert documents.fill(text, blocks) == text, "python -m bench.pretraining report rewrites the page"
    assert set(blocks) <= set(documents.names(text))
    for figure in (
        pretraining.FIGURES[chapter] for chapter in pretraining.chapters() if chapter in pretraining.FIGURES
    ):
        assert figure.is_file() and f"](images/{figure.name})" in text
    readme, brief = documents.README.read_text(), pretraining.in_brief()
    assert documents.fill(readme, brief) == readme and set(brief) <= set(documents.names(readme))
    for done in filter(store.is_done, plan.runs()):
        last = store.last_evaluation(store.folder(done))
        assert any(
            f"{done.arm.name}: {done.arm.what} | {done.seed} |" in line
            and f"{last['accuracy']:.4f} | {last['loss']:.3f}" in line
            for line in text.splitlines()
        ), done.name


def test_the_page_of_the_tasks_shows_their_results():
    text = finetuning.PAGE.read_text()
    assert documents.fill(text, {"finetuning": finetuning.report()}) == text
    assert "finetuning" in documents.names(text)
    shown = re.findall(r"\]\(images/(finetuning-.+?\.png)\)", text)
    assert shown and all((finetuning.PAGE.parent / "images" / name).is_file() for name in shown)
