"""The HTML report of a run, read back by a parser and held against its CSV."""

import csv
import json
import sys

import pytest
from bench_results import measured
from check_report import pages_of_kept_results
from html_page import Page
from sample_results import COLUMNS, sample_rows, write_record, write_rows, write_sample

from bench import run, session
from bench.harness import Failure
from bench.report import model_charts
from bench.report.__main__ import main
from bench.report.document import make_report
from bench.report.drawing import looks
from bench.report.kernel_charts import kernel_drawings
from bench.report.model_charts import model_drawings
from bench.report.outcome import losses, wins
from bench.report.results import read_results
from hbert.data import HbertError

HOSTILE = "</td><script>alert('1')</script>&amp;$x^{"
_NEWER = ("verdict", "canary_ms", "canary_drift", "median_lo", "median_hi")
OLDER = tuple(name for name in COLUMNS if name not in _NEWER)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The CSV of the sample, the lines for the terminal, and the page."""
    path = write_sample(tmp_path_factory.mktemp("report"))
    lines = make_report(path)
    return path, lines, Page((path.with_suffix("") / "index.html").read_text())


def cells(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def few(*suites):
    return [row for row in sample_rows() if row["suite"] in suites]


def shown(path, **about):
    """The page of a CSV, and the lines for the terminal."""
    write_record(path.with_suffix(".json"), **about)
    lines = make_report(path)
    return Page((path.with_suffix("") / "index.html").read_text()), "\n".join(lines)


def charts(drawings):
    return {drawing.title: drawing.chart for drawing in drawings}


def sample_charts(tmp_path, suite, draw):
    rows = read_results(write_sample(tmp_path)).of(suite)
    return charts(draw(rows, looks(rows)))


def test_the_page_needs_nothing_else(made):
    _, _, page = made
    page.check_self_contained()
    page.check_figures()
    assert page.values("content") == ["width=device-width, initial-scale=1"]


def test_the_pages_that_a_browser_looks_at(tmp_path):
    for path, title in zip(pages_of_kept_results(tmp_path), ["Pretraining runs", "Fine-tuning"], strict=True):
        page = Page(path.read_text())
        page.check_self_contained()
        assert title in page.text and "img" in page.tags


def test_every_row_of_the_csv_is_in_a_table(made):
    path, _, page = made
    rows = cells(path)
    found = set()
    for suite in dict.fromkeys(row["suite"] for row in rows):
        same = [row for row in rows if row["suite"] == suite]
        varied = [name for name in COLUMNS if len({row[name] for row in same}) > 1]
        wanted = [[row[name] for name in varied] for row in same]
        starts = [index + 1 for index, row in enumerate(page.rows) if row == varied]
        assert wanted in [page.rows[start : start + len(same)] for start in starts]
        constant = {f"{name} {same[0][name]}" for name in COLUMNS if name not in varied and same[0][name]}
        found |= {text for text in constant if text not in page.text}
    assert found == set()


def test_pictures_are_files_too(made):
    path, _, page = made
    pictures = sorted(path.with_suffix("").glob("*.png"))
    assert len(pictures) == 2 * page.tags.count("img")
    assert {
        "latency-latency-against-length-base-fp32-batch-1.png",
        "throughput-throughput.png",
        "kernels-layer-norm-fp32-gb-s-against-the-ceiling.png",
        "kernels-roofline-fp32.png",
        "throughput-peak-memory-dark.png",
        "latency-crossover-of-a-and-s-layers-base-fp32-batch-1.png",
    } < {picture.name for picture in pictures}


def test_wins_and_losses_are_all_named(made):
    path, lines, page = made
    compared = [
        row
        for row in cells(path)
        if row["ratio"] and row["candidate"] != row["baseline"] and row["metric"] != "floor_ratio"
    ]
    better = [row for row in compared if float(row["ratio_lo"]) > 1]
    worse = [row for row in compared if float(row["ratio_hi"]) < 1]
    assert better and worse and len(better) + len(worse) < len(compared)
    counted = f"Of {len(compared)} comparisons {len(better)} are better, {len(worse)} worse, and "
    counted += f"{len(compared) - len(better) - len(worse)} show no difference."
    assert lines[0] == counted and counted in page.text
    named = {(row[0], row[2], row[3], row[4]) for row in page.rows if len(row) == 6}
    for row in better + worse:
        assert (f"{row['candidate']} v {row['baseline']}", row["suite"], row["case"], row["dtype"]) in named
    worst = min((row for row in worse if row["suite"] == "latency"), key=lambda row: float(row["ratio"]))
    assert any(worst["candidate"] in line and worst["case"] in line and line.startswith("  worse") for line in lines)
    assert any(line.startswith("  better   hbert-additive v hf, latency base/1x2048") for line in lines)
    assert lines[-1] == f"report: {path.with_suffix('') / 'index.html'}"


def test_verdicts_are_those_of_the_csv(made):
    path, _, page = made
    columns = next(row for row in page.rows if "verdict" in row and "against" in row)
    lines = [dict(zip(columns, row, strict=True)) for row in page.rows if len(row) == len(columns)]
    ours = [line for line in lines if line["against"]]
    found = {(line["case"], line["candidate"], line["against"], line["dtype"]): line["verdict"] for line in ours}
    told = {(row["case"], row["candidate"], row["baseline"], row["dtype"]): row["verdict"] for row in cells(path)}
    told = {key: verdict for key, verdict in told.items() if verdict}
    assert set(told.values()) == {"faster", "slower", "no difference"}
    assert {key: found[key] for key in told} == told
    assert found["base/8x128/peak", "hbert-v1", "hf", "bf16"] == "less"


def test_memory_that_is_nearly_the_same_is_no_difference(tmp_path):
    (row,) = [
        row
        for row in sample_rows()
        if row["metric"] == "peak_memory" and (row["candidate"], row["baseline"]) == ("hbert-v1", "hf")
    ]
    ratios = {"0.97": "more", "0.99": "the same", "1.0": "the same", "1.015": "the same", "1.03": "less"}
    rows = [row | {"case": text, "ratio": text, "ratio_lo": text, "ratio_hi": text} for text in ratios]
    results = read_results(write_rows(tmp_path / "memory.csv", rows))
    assert {found.case: found.verdict for found in results.rows} == ratios
    assert (len(wins(results.rows)), len(losses(results.rows))) == (1, 1)


@pytest.mark.parametrize(
    "suite, counted",
    [
        ("latency", "with the weights"),
        ("throughput", "beyond weights and optimizer state"),
        ("kernels", "beyond inputs"),
    ],
)
def test_memory_says_what_counts(tmp_path, suite, counted):
    rows = [row | {"suite": suite} for row in sample_rows() if row["metric"] == "peak_memory"]
    results = read_results(write_rows(tmp_path / "memory.csv", rows))
    (drawing,) = model_charts.memory_drawings(results.rows, looks(results.rows))
    assert counted in drawing.caption


def test_the_header_and_what_is_missing(made):
    _, lines, page = made
    for text in (
        "A processor that does not exist",
        "python bench/run.py --size 'base'",
        "0123456789ab-dirty",
        "2.13.0",
        "it ends in -dirty",
        "latency base/1x64 fp32, ct2-int8: wrong",
        "latency, torchao-int8: pip install torchao",
        "was busy: 21 of 200 slices",
        "1 candidate or case failed",
        "up to 3%",
        "7 undisturbed",
        "the candidate is better",
    ):
        assert text in page.text, text
    assert "21 slices of rounds" in page.text  # of a case, not of a row: 3 each of one latency and six kernels
    assert "  failed   1 of the candidates or cases; the report names them" in lines


def test_names_that_are_no_names(tmp_path):
    rows = [
        row | {"candidate": row["candidate"].replace("hbert-v1", HOSTILE), "case": f"{HOSTILE}/8x128"}
        for row in few("throughput")
    ]
    page, text = shown(
        write_rows(tmp_path / "run.csv", rows),
        failures=[{"suite": "throughput", "case": "", "dtype": "", "peer": HOSTILE, "reason": HOSTILE}],
    )
    page.check_self_contained()
    assert "script" not in page.tags and f"throughput, {HOSTILE}: {HOSTILE}" in page.text
    assert HOSTILE in text and any(row[0] == f"{HOSTILE} v hf" for row in page.rows)
    assert all(set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for path in (tmp_path / "run").iterdir())


def test_columns_of_an_older_run_are_enough(tmp_path):
    page, _ = shown(write_rows(tmp_path / "run.csv", few("throughput"), OLDER))
    assert "faster" in page.text and "slower" in page.text and "drift" not in page.text


def test_without_the_json_it_says_so(tmp_path):
    make_report(write_rows(tmp_path / "run.csv", few("throughput")), tmp_path / "elsewhere")
    text = Page((tmp_path / "elsewhere" / "index.html").read_text()).text
    assert "run.csv has no JSON file beside it: the command, what failed and what was left out are unknown" in text
    assert "A processor that does not exist" in text


def test_a_run_that_measured_nothing(tmp_path):
    page, text = shown(write_rows(tmp_path / "run.csv", []), dropped=180)
    assert "180 slices of rounds" in page.text
    assert "Nothing was measured." in page.text and "Nothing was compared" in text and "img" not in page.tags


def test_latency_against_length(tmp_path):
    found = sample_charts(tmp_path, "latency", model_drawings)
    chart = found["Latency against length: base, fp32, batch 1"]
    (line,) = [line for line in chart.lines if line.series.label == "hf"]
    assert list(line.x) == [64, 128, 512, 2048] and line.series.peer
    assert line.y[0] == pytest.approx(64 * (0.66 + 0.55 * 0.064), rel=1e-5)
    assert line.low[0] == pytest.approx(0.97 * line.y[0], rel=1e-4)
    assert len(chart.lines) == 9 and chart.log
    bars = found["Latency"]  # of batch 8 there is one length
    assert [group.title for group in bars.groups] == ["base/8x128, fp32"]


def test_where_additive_layers_become_faster(tmp_path):
    """0.45 n against 0.42 n + 0.42 n^2 / 1000: equal at n = 71."""
    rows = read_results(write_sample(tmp_path)).of("latency")
    (drawing,) = [one for one in model_drawings(rows, looks(rows)) if one.title.startswith("Crossover")]
    (line,) = drawing.chart.lines
    assert list(line.y) == pytest.approx([(0.42 + 0.42 * n / 1000) / 0.45 for n in line.x], rel=1e-4)
    assert "hbert-additive becomes faster between 64 and 128 tokens" in drawing.caption
    assert line.low[0] == pytest.approx(line.y[0] * 0.97 / 1.05, rel=1e-4)


def test_rates_stand_beside_what_the_machine_can_do(tmp_path):
    chart = sample_charts(tmp_path, "kernels", kernel_drawings)["layer_norm, fp32: GB/s against the ceiling"]
    assert [group.title for group in chart.groups] == ["layer_norm.plain", "layer_norm.residual"]
    row = chart.groups[0].rows[0]
    values = {point.series.label: point.value for point in row.points}
    # 128 tokens in 0.032 ms on the floor; the op takes 1 / 0.9 of it, eager 1.9 of it.
    assert values == {
        name: pytest.approx(rate, rel=1e-4)
        for name, rate in {"hbert": 42.1875, "eager": 24.6711, "compile": 46.875, "ceiling": 46.875}.items()
    }
    assert [point.series.label for point in row.points if point.limit] == ["ceiling"]


def test_a_model_stands_beside_its_matrix_products(tmp_path):
    chart = sample_charts(tmp_path, "throughput", model_drawings)["Throughput"]
    rows = {row.label: [(point.value, point.limit) for point in row.points] for row in chart.groups[0].rows}
    assert rows == {
        "hf": [(505, False)],
        "hf-compile": [(1000, False)],
        "hbert-v1": [(910.5, False), (pytest.approx(910.5 / 0.8, rel=1e-4), True)],
        "hbert-v2": [(1010, False), (pytest.approx(1010 / 0.8, rel=1e-4), True)],
    }


@pytest.mark.parametrize(
    "columns, low, high, told", [(COLUMNS, 0.99, 1.02, "95% interval of the median"), (OLDER, 0.97, 1.05, "percentile")]
)
def test_bars_have_the_interval_of_the_median_where_it_is_known(tmp_path, columns, low, high, told):
    rows = read_results(write_rows(tmp_path / "run.csv", few("throughput"), columns)).rows
    (bars,) = [one for one in model_drawings(rows, looks(rows)) if one.title == "Throughput"]
    dot = bars.chart.groups[0].rows[0].points[0]
    assert (dot.low, dot.high) == pytest.approx((low * dot.value, high * dot.value), rel=1e-4)
    assert told in bars.caption


def changed(column, value):
    def change(lines):
        at = lines[0].split(",").index(column)
        return [lines[0], *(",".join([*line.split(",")[:at], value, *line.split(",")[at + 1 :]]) for line in lines[1:])]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [], "it has no column suite, case"),
        (lambda lines: [lines[0].replace("median", "middle"), *lines[1:]], "it has no column median"),
        (changed("median", "fast"), "line 2: 'fast' in column median is not a number"),
        (changed("ratio", "nan"), "line 2: 'nan' in column ratio is not a number"),
        (changed("median", ""), "line 2: column median is empty"),
        (lambda lines: [lines[0], lines[1] + ",1"], "line 2: not as many cells as there are columns"),
        (lambda lines: [lines[0], lines[1][:-60]], "line 2: not as many cells as there are columns"),
        (lambda lines: [lines[0], '"' + lines[1]], "cannot read"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, change, message):
    path = write_rows(tmp_path / "run.csv", few("throughput"))
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(SystemExit) as stopped:
        main([str(path)])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"about": {}, "failures": [{"suite": "latency"}]}'])
def test_a_json_file_that_is_none_of_ours(tmp_path, text):
    path = write_rows(tmp_path / "run.csv", few("throughput"))
    path.with_suffix(".json").write_text(text)
    with pytest.raises(HbertError, match="run.json"):
        read_results(path)


def test_files_that_are_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run.csv")])
    assert "cannot read" in capsys.readouterr().err
    path = write_rows(tmp_path / "run.csv", few("throughput"))
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(SystemExit):
        main([str(path)])
    assert "cannot write the report" in capsys.readouterr().err


def finished_run(tmp_path, monkeypatch, capsys, failures=()):
    """What bench/run.py prints, and its exit code, after one case: ours is faster than hf, slower than compiled."""
    calls = {"hf": [(0.4,)] * 3, "hbert-v1": [(0.2,)] * 3, "hf-compile": [(0.1,)] * 3}

    def measure(plans, setup, report, save_report):
        report.add(measured(calls=calls), ("hbert-v1",), ("hf", "hf-compile"))
        report.failures += failures

    monkeypatch.setattr(session, "run", measure)
    code = run.main(["--out", str(tmp_path), "--threads", "1"])
    return capsys.readouterr().out, code


def test_a_run_ends_with_its_report(tmp_path, monkeypatch, capsys):
    failure = Failure("latency", "8x128", "bf16", "hbert-v2", "worker died")
    out, code = finished_run(tmp_path, monkeypatch, capsys, [failure])
    (page,) = tmp_path.glob("*/index.html")
    assert code == 1 and out.splitlines()[-1] == f"report: {page}"
    assert "  better   hbert-v1 v hf, latency 8x128, bf16: latency 2.00 [2.00, 2.00]" in out
    assert "  worse    hbert-v1 v hf-compile, latency 8x128, bf16: latency 0.50 [0.50, 0.50]" in out
    text = Page(page.read_text()).text
    assert "bench/run.py --out" in text and "latency 8x128 bf16, hbert-v2: worker died" in text
    assert "4 slices of rounds, disturbed" in text


def test_a_run_without_matplotlib_keeps_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, code = finished_run(tmp_path, monkeypatch, capsys)
    assert code == 0 and "no HTML report: drawing needs matplotlib: pip install matplotlib" in out
    (stored,) = tmp_path.glob("*.json")
    assert json.loads(stored.read_text())["rows"]


def test_markdown_tables_hold_every_comparison(tmp_path, capsys):
    path = write_sample(tmp_path)
    assert main([str(path), "--markdown"]) == 0
    assert not path.with_suffix("").exists()  # nothing is written
    lines, heading, found = capsys.readouterr().out.splitlines(), "", {}
    for line in lines:
        values = [value.strip() for value in line.strip("|").split("|")]
        if line.startswith("| case"):
            columns = values
        elif not line.startswith("|"):
            heading = line or heading
        elif "---" not in line:
            found[heading, values[0], values[1]] = dict(zip(columns, values, strict=True))
    comparisons = [
        row
        for row in cells(path)
        if row["metric"] in ("latency", "throughput", "time")
        and row["baseline"] not in ("", row["candidate"])
        and row["ratio"]
        and not row["baseline"].startswith("floor")
    ]
    assert comparisons
    for row in comparisons:
        line = found[f"{row['suite']}, {row['dtype']}:", row["case"], row["candidate"]]
        ratio = line[f"against {row['baseline']}"].split()[0]
        assert float(ratio) == pytest.approx(float(row["ratio"]), rel=0.05)
        assert float(line[row["unit"]]) == pytest.approx(float(row["median"]), rel=0.005)
