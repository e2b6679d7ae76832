"""The figures of the suites that measure models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.harness import is_floor
from bench.report.drawing import SPREAD, Drawing, Looks, grouped, is_timed, once, point, whiskers
from bench.report.outcome import ratio_text
from bench.report.results import Measurement
from bench.suites import SUITES
from bench.suites.suite import FLOOR_RATIO, FLOP_RATE, PEAK_MEMORY
from hbert.reporting.lines import Line, LineChart
from hbert.reporting.rows import Group, Point, Row, RowChart
from hbert.reporting.style import Series

_ADDITIVE, _SELF = "hbert-additive", "hbert-vanilla"
_FORMS = ("", "-c", "+optimize", "-c+optimize")  # of the additive model; the other has no convolution
_TIME = "ms"  # a unit of which less is better
_MOST_ROWS = 30  # of one figure of ratios
_LIMIT = Series("its matrix products alone", 0)


def model_drawings(rows: Sequence[Measurement], look: Looks) -> list[Drawing]:
    """The figures of a suite: against length where there are lengths, bars elsewhere, ratios, products, memory."""
    timed = [row for row in rows if is_timed(row)]
    shown = [row for row in once(timed) if not is_floor(row.candidate)]
    longs: list[Drawing] = []
    others: list[Measurement] = []
    for (kind, dtype, batch), same in grouped(shown, lambda row: (row.kind, row.dtype, row.batch)).items():
        if len({row.seq for row in same}) > 1 and same[0].unit == _TIME:
            longs.append(_against_length(same, f"{kind}, {dtype}, batch {batch}", look))
            longs += _crossover(same, f"{kind}, {dtype}, batch {batch}")
        else:
            others += same
    return [
        *longs,
        *_bars(others, rows, look),
        *_ratios(timed, look),
        *_products(rows, look),
        *memory_drawings(rows, look),
    ]


def memory_drawings(rows: Sequence[Measurement], look: Looks) -> list[Drawing]:
    """Bars of the peak memory of each case."""
    weighed = once(row for row in rows if row.metric == PEAK_MEMORY.name)
    if not weighed:
        return []
    groups = [
        Group(place, [_bar(row, None, look) for row in same])
        for place, same in grouped(weighed, lambda row: row.place).items()
    ]
    counted = SUITES[weighed[0].suite].weighs if weighed[0].suite in SUITES else "one call"
    caption = f"Less is better. Of {counted}; measured once, so there is no interval."
    chart = RowChart(f"peak memory, {weighed[0].unit}", groups, bars=True)
    return [Drawing(chart, "Peak memory", caption)]


def _against_length(rows: Sequence[Measurement], what: str, look: Looks) -> Drawing:
    lines = []
    for name, same in grouped(rows, lambda row: row.candidate).items():
        found = sorted(same, key=lambda row: row.seq)
        low, high = [row.p10 or row.median for row in found], [row.p90 or row.median for row in found]
        lines.append(Line(look[name], [row.seq for row in found], [row.median for row in found], low, high))
    lengths = sorted({row.seq for row in rows})
    chart = LineChart("tokens in a sequence", f"{rows[0].metric}, {rows[0].unit}", lines, log=True, ticks=lengths)
    caption = f"Lower is better. Solid: ours; dashed: peers. {SPREAD} Both axes are logarithmic."
    return Drawing(chart, f"{rows[0].metric.capitalize()} against length: {what}", caption)


def _crossover(rows: Sequence[Measurement], what: str) -> list[Drawing]:
    """The times of self-attention over those of additive attention, over length, if both were measured."""
    by_name = grouped(rows, lambda row: row.candidate)
    lines: list[Line] = []
    found: list[str] = []
    for form in _FORMS:
        slow = {row.seq: row for row in by_name.get(_SELF + form.replace("-c", ""), [])}
        fast = {row.seq: row for row in by_name.get(_ADDITIVE + form, [])}
        if len(lengths := sorted(slow.keys() & fast.keys())) < 2:
            continue
        pairs = [(slow[seq], fast[seq]) for seq in lengths]
        ratios = [a.median / b.median for a, b in pairs]
        low = [(a.p10 or a.median) / (b.p90 or b.median) for a, b in pairs]
        high = [(a.p90 or a.median) / (b.p10 or b.median) for a, b in pairs]
        lines.append(Line(Series(_ADDITIVE + form, len(lines)), lengths, ratios, low, high))
        found.append(f"By the medians {_ADDITIVE + form} {_crossing(lengths, ratios)}.")
    if not lines:
        return []
    chart = LineChart(
        "tokens in a sequence", f"time of {_SELF} / its time", lines, {"equal": 1.0}, log=True, ticks=list(lines[0].x)
    )
    caption = (
        f"Above 1 a model of additive layers is faster than one of self-attention layers. {' '.join(found)} "
        "Whiskers: the 10th percentile of one over the 90th of the other; no confidence interval."
    )
    return [Drawing(chart, f"Crossover of A and S layers: {what}", caption)]


def _crossing(lengths: Sequence[int], ratios: Sequence[float]) -> str:
    """Where the ratio passes 1, as far as the measured lengths tell."""
    above = [ratio > 1 for ratio in ratios]
    changes = [index for index in range(1, len(above)) if above[index] != above[index - 1]]
    if not changes:
        return f"is {'faster' if above[0] else 'not faster'} at every measured length"
    if len(changes) > 1:
        return "crosses 1 more than once"
    words = "becomes faster" if above[-1] else "becomes slower"
    return f"{words} between {lengths[changes[0] - 1]} and {lengths[changes[0]]} tokens"


def _bars(shown: Sequence[Measurement], rows: Sequence[Measurement], look: Looks) -> list[Drawing]:
    """Bars with the spread of the calls; a stroke where the model's matrix products alone would end."""
    drawings = []
    for metric, same in grouped(shown, lambda row: row.metric).items():
        floors = _floors(rows, metric)
        groups = [
            Group(place, [_bar(row, floors.get((row.place, row.candidate)), look) for row in found])
            for place, found in grouped(same, lambda row: row.place).items()
        ]
        better = "Lower" if same[0].unit == _TIME else "Higher"
        stroke = " Stroke: what its matrix products alone would reach." if floors else ""
        chart = RowChart(f"{metric}, {same[0].unit}", groups, bars=True)
        caption = f"{better} is better. Filled: ours; hollow: peers. {whiskers(same)}{stroke}"
        drawings.append(Drawing(chart, metric.capitalize(), caption))
    return drawings


def _bar(row: Measurement, floor: Measurement | None, look: Looks) -> Row:
    limits = [Point(_LIMIT, floor.median, limit=True)] if floor else []
    return Row(row.candidate, [point(row, look[row.candidate]), *limits], f"{row.median:.4g}")


def _floors(rows: Iterable[Measurement], metric: str) -> dict[tuple[str, str], Measurement]:
    """The floor of each candidate of each case, in a metric."""
    rows = list(rows)
    values = {(row.place, row.candidate): row for row in rows if row.metric == metric and is_floor(row.candidate)}
    pairs = [row for row in rows if row.metric == FLOOR_RATIO.name]
    return {
        (row.place, row.candidate): values[row.place, row.baseline]
        for row in pairs
        if (row.place, row.baseline) in values
    }


def _ratios(timed: Sequence[Measurement], look: Looks) -> list[Drawing]:
    """Each comparison as a point with its interval, on either side of 1."""
    compared = [row for row in timed if row.is_comparison]
    together = len(compared) <= _MOST_ROWS
    caption = (
        "Right of 1 the candidate is better. Whiskers: 95% interval of the ratio over the rounds; one that "
        "reaches over 1 shows no difference."
    )
    drawings = []
    for place, found in grouped(compared, lambda row: "" if together else row.place).items():
        groups = [
            Group(title, [_ratio_row(row, look) for row in same])
            for title, same in grouped(found, lambda row: row.place).items()
        ]
        chart = RowChart("ratio", groups, log=True, reference=1.0)
        title = f"Candidate against peer{': ' if place else ''}{place}"
        drawings.append(Drawing(chart, title, caption))
    return drawings


def _ratio_row(row: Measurement, look: Looks) -> Row:
    assert row.ratio is not None
    dot = Point(look[row.candidate], row.ratio, row.ratio_lo, row.ratio_hi)
    return Row(f"{row.candidate} v {row.baseline}", [dot], ratio_text(row))


def _products(rows: Sequence[Measurement], look: Looks) -> list[Drawing]:
    """How much of the rate of packed matrix products each model reaches."""
    floors = _floors(rows, FLOP_RATE.name)
    rates = [row for row in once(rows) if row.metric == FLOP_RATE.name and (row.place, row.candidate) in floors]
    if not rates:
        return []
    groups = [
        Group(place, [_bar(row, floors[row.place, row.candidate], look) for row in same])
        for place, same in grouped(rates, lambda row: row.place).items()
    ]
    caption = (
        f"Stroke: the rate of the same products with packed weights, measured in the same rounds. {whiskers(rates)}"
    )
    chart = RowChart(f"rate, {rates[0].unit}", groups, bars=True)
    return [Drawing(chart, "Operations a second, against packed products", caption)]
