"""Curves and points over two axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .style import DASHES, NOTE_POINTS, Series, Theme, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_HEIGHT_INCHES, _LEGEND_INCHES = 3.4, 0.2
_ROOMY, _MORE_INCHES = 5, 0.2  # lines, and height for each beyond them
_BESIDE = 18  # characters of a label that has room beside its line
_MOST_BESIDE = 12  # labels
_TWO_COLUMNS = 26  # characters of a label in a legend of two columns
_LABEL_INCHES, _MARGIN_INCHES = 0.17, 0.6  # height of a label beside its line, and of what is below the axes
_FEWEST_DECADES = 0.9  # a logarithmic axis over less gets evenly spaced numbers
_EVEN_TICKS, _MOST_TICKS = 6, 14
_EDGE = 0.9  # of the width: lines that end beyond it have their names in the margin


@dataclass(frozen=True)
class Line:
    """One curve: ``x`` and ``y`` of the same length, with the ends of the intervals of ``y`` where there are any.

    With ``names`` it is points without a curve, each beside its name. ``dots``: indices of points that stand out.
    """

    series: Series
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    names: Sequence[str] = ()
    dots: Sequence[int] = ()


@dataclass(frozen=True)
class LineChart:
    """Curves over one axis, and horizontal ``marks`` (label to y).

    With ``log`` both axes are logarithmic, and the numbers at the lower one are ``ticks``, if given.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Mapping[str, float] = field(default_factory=dict)
    log: bool = False
    ticks: Sequence[float] = ()

    @property
    def height(self) -> float:
        """In inches."""
        if not self._labels_beside:
            return _HEIGHT_INCHES + _LEGEND_INCHES * self._legend_rows
        return _HEIGHT_INCHES + _MORE_INCHES * max(0, len(self.lines) - _ROOMY)

    def draw(self, figure: Figure, theme: Theme) -> None:
        """Draws it on an empty figure."""
        axes = figure.add_subplot()
        for line in self.lines:
            _draw_line(axes, line, theme)
        _draw_marks(axes, self.marks, self.log, theme)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        self._scale(axes)
        if self._labels_beside:
            _draw_labels(axes, self.lines, _LABEL_INCHES / (self.height - _MARGIN_INCHES), theme)
        else:
            figure.legend(loc="outside lower center", ncols=self._legend_columns)

    def _scale(self, axes: Axes) -> None:
        from matplotlib.ticker import FixedLocator

        axes.xaxis.set_major_formatter(short)
        if not self.log:
            axes.set_xlim(left=0)
            return
        axes.set_xscale("log")
        axes.set_yscale("log")
        set_log_ticks(axes.yaxis, _MOST_TICKS)
        set_log_ticks(axes.xaxis, _MOST_TICKS)
        if self.ticks:
            axes.xaxis.set_major_locator(FixedLocator(list(self.ticks)))

    @property
    def _labels_beside(self) -> bool:
        """Whether every line can have its name at its end."""
        return len(self.lines) <= _MOST_BESIDE and self._longest <= _BESIDE

    @property
    def _longest(self) -> int:
        return max((len(line.series.label) for line in self.lines), default=0)

    @property
    def _legend_columns(self) -> int:
        return 2 if self._longest <= _TWO_COLUMNS else 1

    @property
    def _legend_rows(self) -> int:
        return -(-len(self.lines) // self._legend_columns)


def set_log_ticks(axis: Axis, most: int) -> None:
    """Plain numbers on a logarithmic axis: evenly spaced over a small range, else at 1, 2 and 5 of each decade.

    Where these would be more than ``most``, there are only those at 1.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < _FEWEST_DECADES:
        axis.set_major_locator(MultipleLocator(_step(high - low)))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if 3 * decades <= most else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(short))


def _step(span: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that divides a span into few parts."""
    least = span / _EVEN_TICKS
    power = 10.0 ** math.floor(math.log10(least))
    return power * next(digit for digit in (1, 2, 5, 10) if power * digit >= least)


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights in [0, 1] until neighbours are ``gap`` apart, in the same order and inside where they fit."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for before, index in zip(order, order[1:], strict=False):
        moved[index] = max(moved[index], moved[before] + gap)
    ceiling = max(1.0, gap * (len(order) - 1))
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


def _draw_line(axes: Axes, line: Line, theme: Theme) -> None:
    series, colour = line.series, theme.colour(line.series.colour)
    dash = DASHES[series.colour // len(theme.series) % len(DASHES)]
    has_intervals = len(line.low) > 0
    # A run with one evaluation is a point: no line would show it.
    marker = "o" if has_intervals or line.names or len(line.x) == 1 else ""
    style: dict[str, Any] = {"color": colour, "lw": 1.8, "marker": marker, "ms": 4.5}
    style |= {"markerfacecolor": theme.paper if series.peer else colour, "label": series.label}
    style["ls"] = "none" if line.names else "dashed" if series.peer else dash
    if has_intervals:
        spans = list(zip(line.y, line.low, line.high, strict=True))
        below, above = [max(0, y - low) for y, low, _ in spans], [max(0, high - y) for y, _, high in spans]
        axes.errorbar(line.x, line.y, yerr=(below, above), elinewidth=1, **style)
    else:
        axes.plot(line.x, line.y, **style)
    if line.dots:
        dots = [line.x[index] for index in line.dots], [line.y[index] for index in line.dots]
        axes.plot(*dots, "o", color=colour, ms=5.5, zorder=4)  # above the names of marks
    _draw_names(axes, line, colour)


def _draw_names(axes: Axes, line: Line, colour: str) -> None:
    """By turns above to the left and below to the right, so that points of one line can be close."""
    note: dict[str, Any] = {"textcoords": "offset points", "color": colour, "fontsize": NOTE_POINTS}
    for index, (name, x, y) in enumerate(zip(line.names, line.x, line.y, strict=False)):
        side = (-2, 2, "right", "bottom") if index % 2 == 0 else (2, -2, "left", "top")
        axes.annotate(name, (x, y), side[:2], ha=side[2], va=side[3], **note)


def _draw_labels(axes: Axes, lines: Sequence[Line], gap: float, theme: Theme) -> None:
    """The name of each line beside its last point.

    Those that end at the right edge stand in the margin, moved apart, with a hair to the point. A hair from further
    inside would look like a curve.
    """
    place = axes.transData + axes.transAxes.inverted()
    margin: list[tuple[Series, tuple[float, float], float]] = []
    for line in lines:
        seen = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        if not seen:
            continue
        right, height = place.transform(seen[-1])
        if right >= _EDGE:
            margin.append((line.series, seen[-1], float(height)))
        else:
            axes.annotate(
                line.series.label, seen[-1], (6, 0), textcoords="offset points", va="center",
                color=theme.colour(line.series.colour), fontsize=NOTE_POINTS + 1,
            )  # fmt: skip
    heights = spread_apart([height for _, _, height in margin], gap)
    for (series, point, _), height in zip(margin, heights, strict=True):
        colour = theme.colour(series.colour)
        axes.annotate(
            series.label, point, (1.07, height), xycoords="data", textcoords="axes fraction", va="center",
            color=colour, fontsize=NOTE_POINTS + 1,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def _draw_marks(axes: Axes, marks: Mapping[str, float], to_the_right: bool, theme: Theme) -> None:
    style: dict[str, Any] = {"color": theme.mark, "fontsize": NOTE_POINTS, "va": "bottom"}
    style["ha"] = "right" if to_the_right else "left"
    # Paper behind the letters: curves pass under them.
    box = {"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for label, y in marks.items():
        axes.axhline(y, color=theme.mark, lw=1, ls=(0, (1, 2)), zorder=1)
        axes.text(0.99 if to_the_right else 0.01, y, label, style, bbox=box, transform=axes.get_yaxis_transform())
