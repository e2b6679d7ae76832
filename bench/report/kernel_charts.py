"""The figures of the suite that measures single ops."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.harness import is_floor
from bench.ops import NAMES, Setting, load
from bench.report.drawing import RATES, Drawing, Looks, grouped, is_timed, once, point, whiskers
from bench.report.model_charts import memory_drawings
from bench.report.results import Measurement
from bench.suites.suite import BANDWIDTH, FLOP_RATE
from hbert.reporting.lines import Line, LineChart
from hbert.reporting.rows import Group, Point, Row, RowChart
from hbert.reporting.style import Series

_CEILING = Series("ceiling", 0)
_CASE = re.compile(r"((\w+)(?:\.([\w-]+))?/\w+)/(\w+)/(\w+)")  # op.variant/shape, op, variant; step; place of buffers
_STEPS = {"fwd": "f", "bwd": "b", "full": "fb"}
_COUNTED = "cpp"  # the backend whose operations are known
_ROOM = 1.5  # times, beyond the points on either side
_ROOFLINE = (
    "Higher is better. Of each op the shape and variant with the most operations; f: forward, b: backward, fb: both. "
    "Operations and bytes are counted as in docs/kernels.md: those of our CPU kernels, an exponential as 20; each "
    "tensor once, without write-allocate. Not counted are parameters of norms and what has a row per sequence; "
    "additive attention with its key weight has no point, as forms with other counts share one cost: "
    "additive_attention is its core. Slanted: streams of as many bytes; flat: packed products; each the median over "
    "the floors of these points, a measured rate and no bound. Our own products may be faster, int8_linear multiplies "
    "int8 numbers, and an op whose buffers stay in the caches (cache) may lie above streams from memory (dram)."
)


def kernel_drawings(rows: Sequence[Measurement], look: Looks) -> list[Drawing]:
    """Rooflines; for each op and dtype its rate against the machine's ceiling, and its time against the peers'."""
    drawings = _rooflines(rows)
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


@dataclass(frozen=True)
class _Work:
    """What a call of ours gets done: operations, how many for each byte, and 10^9 of them a second."""

    case: str
    where: str  # the case without its step
    step: str
    operations: int
    intensity: float
    rate: float


def _rooflines(rows: Sequence[Measurement]) -> list[Drawing]:
    """For each dtype: operations a second of our ops against their operations for each byte, under two ceilings."""
    drawings = []
    for dtype, same in grouped(once(rows), lambda row: row.dtype).items():
        ops = list(filter(None, map(_largest, grouped(filter(is_timed, same), _op).values())))
        works = [work for steps in ops for work in steps]
        cases = {work.case for work in works}
        floors = [row for row in same if is_floor(row.candidate) and row.case in cases]
        if floors:
            dots = [_dots(number, steps) for number, steps in enumerate(ops, 1)]
            lines = [*_ceilings(floors, [work.intensity for work in works]), *dots]
            chart = LineChart("operations for each byte", "10^9 operations a second", lines, log=True)
            drawings.append(Drawing(chart, f"Roofline, {dtype}", _ROOFLINE))
    return drawings


def _largest(rows: Sequence[Measurement]) -> list[_Work]:
    """The steps of an op at the shape and in the variant with the most operations."""
    works = [work for row in rows if (work := _work(row)) is not None]
    best = max(works, key=lambda work: work.operations, default=None)
    return [work for work in works if best is not None and work.where == best.where]


def _work(row: Measurement) -> _Work | None:
    """None of peers, and where the operations are not known."""
    found = _CASE.fullmatch(row.case)
    if found is None or found[2] not in NAMES or row.cells.get("backend") != _COUNTED:
        return None
    op, variant, step = load(found[2]), found[3] or "", found[4]
    if variant not in op.variants or step not in op.steps or row.candidate not in op.candidates(variant):
        return None
    cost = op.cost(Setting(variant, row.batch, row.seq, step, row.dtype))
    if cost.operations is None:
        return None
    intensity, rate = cost.operations / (cost.reads + cost.writes), FLOP_RATE.value(1e-3 * row.median, cost.operations)
    return _Work(row.case, f"{found[1]}, {found[5]}", step, cost.operations, intensity, rate)


def _ceilings(floors: Sequence[Measurement], intensities: Sequence[float]) -> list[Line]:
    """Streams up to where packed products take over; one of them alone where the other was not measured."""
    rates = {name: median(row.median for row in same) for name, same in grouped(floors, lambda row: row.metric).items()}
    memory, product = rates.get(BANDWIDTH.name), rates.get(FLOP_RATE.name)
    ridge = [product / memory] if memory and product else []
    low, high = min([*intensities, *ridge]) / _ROOM, max([*intensities, *ridge]) * _ROOM
    lines = []
    if memory:
        ends = [low, *(ridge or [high])]
        lines.append(Line(Series(f"streams, {memory:.3g} GB/s", 0), ends, [memory * x for x in ends]))
    if product:
        ends = [*(ridge or [low]), high]
        lines.append(Line(Series(f"packed products, {product:.3g} GFLOP/s", 0), ends, [product] * 2))
    return lines


def _dots(number: int, steps: Sequence[_Work]) -> Line:
    """A point for each step of an op, which has a number in the legend."""
    return Line(
        Series(f"{number} {steps[0].where}", number),
        [work.intensity for work in steps],
        [work.rate for work in steps],
        names=[f"{number}{_STEPS[work.step]}" for work in steps],
    )
