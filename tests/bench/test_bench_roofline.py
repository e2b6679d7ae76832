"""The roofline of the kernels suite, from made-up results: its points and its two lines, and what has no point."""

import pytest
from sample_results import write_rows

from bench.ops import NAMES
from bench.report.drawing import looks
from bench.report.kernel_charts import kernel_drawings
from bench.report.results import read_results
from bench.suites import SUITES
from bench.suites.suite import BANDWIDTH, FLOP_RATE, Wanted

# Case, milliseconds of ours, rate of the floor.
NORMS = [
    ("layer_norm.residual/8x512/fwd/dram", 2.0, 30.0),
    ("layer_norm.residual/8x512/bwd/dram", 4.0, 50.0),
    ("layer_norm.residual/1x128/fwd/cache", 0.1, 500.0),  # not the largest shape
    ("layer_norm.plain/8x512/fwd/dram", 1.0, 900.0),  # fewer operations
]
PRODUCTS = [("packed_linear.square/8x128/fwd/dram", 10.0, 160.0)]


def rows_of(case, ms, floor, candidate="hbert", backend="cpp"):
    batch, seq = case.split("/")[1].split("x")
    same = {"suite": "kernels", "case": case, "dtype": "fp32", "batch": batch, "seq": seq}
    rate = FLOP_RATE if case.startswith("packed_linear") else BANDWIDTH
    times = {candidate: (ms, backend), "eager": (9 * ms, "torch")}
    rows = [
        same | {"candidate": name, "baseline": "eager", "metric": "time", "unit": "ms", "median": time, "backend": by}
        for name, (time, by) in times.items()
    ]
    return [*rows, same | {"candidate": "floor", "metric": rate.name, "unit": rate.unit, "median": floor}]


def roofline(tmp_path, rows):
    """The ends of each line by its label, the points by their names, and the entries that tell the points."""
    read = read_results(write_rows(tmp_path / "run.csv", rows)).rows
    charts = [one.chart for one in kernel_drawings(read, looks(read)) if one.title == "Roofline, fp32"]
    lines = [line for chart in charts if chart.log for line in chart.lines]
    ends = {line.series.label: (*line.x, *line.y) for line in lines if not line.names}
    points = {name: (x, y) for line in lines for name, x, y in zip(line.names, line.x, line.y, strict=False)}
    return ends, points, [line.series.label for line in lines if line.names]


def test_points_and_both_lines(tmp_path):
    lines, points, entries = roofline(tmp_path, [row for case in (*NORMS, *PRODUCTS) for row in rows_of(*case)])
    values, flop = 8 * 512 * 768, 2 * 1024 * 768 * 768
    assert entries == ["1 layer_norm.residual/8x512, dram", "2 packed_linear.square/8x128, dram"]
    # 9 and 17 operations for 4 numbers of 4 bytes; a product of [1024, 768] and [768, 768].
    assert points == {
        "1f": pytest.approx((9 / 16, 9 * values / 2e-3 / 1e9)),
        "1b": pytest.approx((17 / 16, 17 * values / 4e-3 / 1e9)),
        "2f": pytest.approx((flop / 4 / (2 * 1024 * 768 + 768 * 768), flop / 10e-3 / 1e9)),
    }
    # The streams beside these points have 30 and 50 GB/s, the product 160 GFLOP/s: they meet at 4 operations a byte.
    assert lines == {
        "streams, 40 GB/s": pytest.approx((0.375, 4, 15, 160)),
        "packed products, 160 GFLOP/s": pytest.approx((4, 1.5 * points["2f"][0], 160, 160)),
    }


@pytest.mark.parametrize(
    "cases, label, heights",
    [(NORMS, "streams, 40 GB/s", (15, 63.75)), (PRODUCTS, "packed products, 160 GFLOP/s", (160, 160))],
)
def test_one_line_where_the_other_was_not_measured(tmp_path, cases, label, heights):
    lines, _, _ = roofline(tmp_path, [row for case in cases for row in rows_of(*case)])
    assert list(lines) == [label] and lines[label][2:] == pytest.approx(heights)


@pytest.mark.parametrize(
    "case, told",
    [
        ("layer_norm.plain/8x512/fwd/dram", {"backend": "triton, graph"}),
        ("additive_attention.dense/8x512/fwd/dram", {"candidate": "hbert-direct"}),
        ("layer_norm.forgotten/8x512/fwd/dram", {}),
        ("forgotten/8x512/fwd/dram", {}),
        ("layer_norm", {}),
    ],
)
def test_ops_without_counted_operations_have_no_point(tmp_path, case, told):
    rows = [row | {"case": case} for row in rows_of("layer_norm.plain/8x512/fwd/dram", 1.0, 30.0, **told)]
    assert roofline(tmp_path, rows) == ({}, {}, [])


def test_every_op_has_a_point_for_each_of_its_steps(tmp_path):
    timed = [case.name for case in SUITES["kernels"].cases(Wanted(dtypes=("fp32",))) if "peak" not in case.name]
    _, points, entries = roofline(tmp_path, [row for case in timed for row in rows_of(case, 1.0, 30.0)])
    assert [entry.split()[1].split("/")[0].split(".")[0] for entry in entries] == list(NAMES)
    assert set(points) == {f"{op}{step}" for op in range(1, 8) for step in "fb"} | {"8f", "8fb", "9f", "10f"}
