"""The figures of the suite that measures single ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.harness import is_floor
from bench.report.drawing import RATES, Drawing, Looks, grouped, is_timed, once, point, whiskers
from bench.report.model_charts import memory_drawings
from bench.report.results import Measurement
from hbert.reporting.rows import Group, Point, Row, RowChart
from hbert.reporting.style import Series

_CEILING = Series("ceiling", 0)


def kernel_drawings(rows: Sequence[Measurement], look: Looks) -> list[Drawing]:
    """For each op and dtype: its rate against the machine's ceiling, and its time against the peers'."""
    drawings = []
    for (op, dtype), same in grouped(rows, lambda row: (_op(row), row.dtype)).items():
        drawings += _rates(f"{op}, {dtype}", same, look)
        drawings += _ratios(f"{op}, {dtype}", same)
    return [*drawings, *memory_drawings(rows, look)]


def _op(row: Measurement) -> str:
    return _variant(row).split(".")[0]


def _variant(row: Measurement) -> str:
    return row.case.split("/")[0]


def _setting(row: Measurement) -> str:
    """Shape, step and place of the buffers."""
    return row.case.partition("/")[2]


def _rates(what: str, rows: Sequence[Measurement], look: Looks) -> list[Drawing]:
    rates = [row for row in once(rows) if row.metric in RATES]

    def dot(row: Measurement) -> Point:
        return point(row, _CEILING, limit=True) if is_floor(row.candidate) else point(row, look[row.candidate])

    caption = (
        "Higher is better. Stroke: what the machine can do, a stream of as many bytes or a packed product of as many "
        f"operations, measured in the same rounds. {whiskers(rates)}"
    )
    return [
        Drawing(
            RowChart(f"{metric.replace('_', ' ')}, {same[0].unit}", _groups(same, dot), legend=True),
            f"{what}: {same[0].unit} against the ceiling",
            caption,
        )
        for metric, same in grouped(rates, lambda row: row.metric).items()
    ]


def _ratios(what: str, rows: Sequence[Measurement]) -> list[Drawing]:
    compared = [row for row in rows if row.is_comparison and is_timed(row)]
    pairs = dict.fromkeys(f"{row.candidate} v {row.baseline}" for row in compared)
    names = {name: Series(name, colour) for colour, name in enumerate(pairs)}

    def dot(row: Measurement) -> Point:
        assert row.ratio is not None
        return Point(names[f"{row.candidate} v {row.baseline}"], row.ratio, row.ratio_lo, row.ratio_hi)

    if not compared:
        return []
    chart = RowChart("ratio of times", _groups(compared, dot), log=True, reference=1.0, legend=True)
    caption = "Right of 1 the candidate is faster. Whiskers: 95% interval of the ratio over the rounds."
    return [Drawing(chart, f"{what}: candidate against peer", caption)]


def _groups(rows: Iterable[Measurement], dot: Callable[[Measurement], Point]) -> list[Group]:
    """A group for each variant of the op, a row for each of its cases."""
    return [
        Group(variant, [Row(setting, [dot(row) for row in same]) for setting, same in grouped(found, _setting).items()])
        for variant, found in grouped(rows, _variant).items()
    ]
