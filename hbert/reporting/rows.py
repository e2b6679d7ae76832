"""Charts of named rows, the value along the lower axis: bars with intervals, or several points on a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .lines import set_log_ticks
from .style import NOTE_POINTS, Series, Theme, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW_INCHES, _AXIS_INCHES, _LEGEND_INCHES = 0.23, 0.6, 0.22
_LEGEND_COLUMNS = 4
_MOST_TICKS = 6  # between names and notes there is little room


@dataclass(frozen=True)
class Point:
    """A value of a series, with the ends of its interval. A ``limit`` is drawn as a stroke, in the colour of text."""

    series: Series
    value: float
    low: float | None = None
    high: float | None = None
    limit: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its ``label`` to the left, its points, and a ``note`` at the right edge."""

    label: str
    points: Sequence[Point]
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Rows under a title of their own; no line is spent on an empty one."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class RowChart:
    """Groups of rows over one axis.

    ``bars`` start at 0; points may stand on a ``log`` axis, and on both sides of a vertical ``reference``. With
    ``legend`` the series are named below; else the label of a row is the name.
    """

    x_label: str
    groups: Sequence[Group]
    bars: bool = False
    log: bool = False
    reference: float | None = None
    legend: bool = False

    @property
    def height(self) -> float:
        """In inches."""
        lines = sum(len(group.rows) + bool(group.title) for group in self.groups)
        legend_rows = -(-len(self._series()) // _LEGEND_COLUMNS) if self.legend else 0
        return _AXIS_INCHES + _ROW_INCHES * lines + _LEGEND_INCHES * legend_rows

    def draw(self, figure: Figure, theme: Theme) -> None:
        """Draws it on an empty figure."""
        axes = figure.add_subplot()
        if self.log:
            axes.set_xscale("log")
        if self.reference is not None:
            axes.axvline(self.reference, color=theme.mark, lw=1, zorder=1)
        self._draw_groups(axes, theme)
        axes.set_xlabel(self.x_label)
        axes.margins(x=0.04)
        if self.log:
            set_log_ticks(axes.xaxis, _MOST_TICKS)
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(short)
        if self.legend:
            _draw_legend(figure, self._series(), theme)

    def _series(self) -> dict[Series, bool]:
        """Every series in order of appearance, and whether it is a limit."""
        points = (point for group in self.groups for row in group.rows for point in row.points)
        return {point.series: point.limit for point in points}

    def _draw_groups(self, axes: Axes, theme: Theme) -> None:
        """Draws all rows from the top down."""
        names: list[tuple[str, bool]] = []
        for group in self.groups:
            if group.title:
                names.append((group.title, True))
            for row in group.rows:
                for point in row.points:
                    _draw_point(axes, -len(names), point, self.bars, theme)
                note: dict[str, Any] = {"va": "center", "fontsize": NOTE_POINTS, "color": theme.mark}
                axes.text(1.01, -len(names), row.note, note, transform=axes.get_yaxis_transform())
                names.append((row.label, False))
        axes.set_ylim(0.4 - len(names), 0.6)
        axes.set_yticks([-y for y in range(len(names))], [name for name, _ in names], fontsize=NOTE_POINTS + 1)
        for label, (_, is_title) in zip(axes.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if is_title else "normal")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=not self.bars, axis="y")
        axes.spines["left"].set_visible(False)


def _draw_point(axes: Axes, y: float, point: Point, bars: bool, theme: Theme) -> None:
    colour = theme.ink if point.limit else theme.colour(point.series.colour)
    if bars and not point.limit:
        face = theme.paper if point.series.peer else colour
        axes.barh(y, point.value, 0.62, facecolor=face, edgecolor=colour, lw=1.2)
        ink: dict[str, Any] = {"color": theme.ink, "marker": ""}
    else:
        ink = {"color": colour, **_marker(point.series, point.limit, theme)}
    if point.low is not None and point.high is not None and point.low < point.high:
        reach = ([max(0, point.value - point.low)], [max(0, point.high - point.value)])
        axes.errorbar([point.value], [y], xerr=reach, elinewidth=1.2, ls="none", **ink)
    elif point.limit or not bars:
        axes.plot([point.value], [y], ls="none", **ink)


def _marker(series: Series, limit: bool, theme: Theme) -> dict[str, Any]:
    if limit:
        return {"marker": "|", "ms": 12, "markeredgewidth": 2, "zorder": 4}
    face = theme.paper if series.peer else theme.colour(series.colour)
    return {"marker": "o", "ms": 5.5, "markerfacecolor": face}


def _draw_legend(figure: Figure, series: dict[Series, bool], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for one, limit in series.items():
        colour = theme.ink if limit else theme.colour(one.colour)
        handles.append(Line2D([], [], color=colour, ls="none", label=one.label, **_marker(one, limit, theme)))
    figure.legend(handles=handles, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=NOTE_POINTS + 1)
