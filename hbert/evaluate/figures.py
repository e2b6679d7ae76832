"""Line charts as PNG files, in a light and a dark version of the same colours, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbert.data.errors import HbertError
from hbert.data.storage import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THEMES = ("light", "dark")
_PAPER = {"light": "#ffffff", "dark": "#16181d"}
_INK = {"light": "#24292f", "dark": "#d7dce2"}
_FAINT = {"light": "#d8dde3", "dark": "#363b44"}
_MARK = {"light": "#6a737d", "dark": "#99a2ad"}
# Told apart by people with colour blindness too; lines beyond the last colour start again dashed.
_COLOURS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#b0558f", "#a87900", "#56a0d3", "#444444"),
    "dark": ("#4cb0e8", "#ff8a4c", "#3dcb9f", "#e79bc4", "#f2c14e", "#a9d8f7", "#c8c8c8"),
}
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_WIDTH_INCHES, _HEIGHT_INCHES, _LEGEND_INCHES, _DPI = 5.4, 3.4, 0.2, 160
_LABEL_CHARACTERS = 26  # in a legend of two columns


@dataclass(frozen=True)
class Line:
    """One curve: ``x`` and ``y`` of the same length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis, and horizontal ``marks`` (label to y)."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: dict[str, float]


def save_chart(chart: Chart, path: Path, theme: str) -> Path:
    """Writes the chart as a PNG of 864 pixels width, complete or not at all, and returns the path.

    Raises:
        HbertError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HbertError("drawing needs matplotlib: pip install matplotlib") from error
    legend_rows = -(-len(chart.lines) // _legend_columns(chart))
    size = (_WIDTH_INCHES, _HEIGHT_INCHES + _LEGEND_INCHES * legend_rows)
    with matplotlib.rc_context(_style(theme)), replacing(path) as temporary:
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        _draw(figure, chart, theme)
        # No version of matplotlib in the file: the same chart gives the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _style(theme: str) -> dict[Any, Any]:
    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK[theme]
    )
    return ink | {
        "font.size": 10,
        "figure.facecolor": _PAPER[theme],
        "savefig.facecolor": _PAPER[theme],
        "axes.facecolor": _PAPER[theme],
        "axes.edgecolor": _FAINT[theme],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _FAINT[theme],
        "grid.linewidth": 0.6,
        "xtick.color": _FAINT[theme],
        "ytick.color": _FAINT[theme],
        "legend.frameon": False,
    }


def _draw(figure: Figure, chart: Chart, theme: str) -> None:
    axes = figure.add_subplot()
    colours = _COLOURS[theme]
    for index, line in enumerate(chart.lines):
        dash = _DASHES[index // len(colours) % len(_DASHES)]
        # A run with one evaluation is a point: no line would show it.
        marker = "o" if len(line.x) == 1 else ""
        axes.plot(
            line.x,
            line.y,
            color=colours[index % len(colours)],
            ls=dash,
            marker=marker,
            lw=1.8,
            label=line.label,
        )
    _draw_marks(axes, chart.marks, theme)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_thousands)
    figure.legend(loc="outside lower center", ncols=_legend_columns(chart))


def _legend_columns(chart: Chart) -> int:
    return 2 if max(len(line.label) for line in chart.lines) <= _LABEL_CHARACTERS else 1


def _draw_marks(axes: Axes, marks: dict[str, float], theme: str) -> None:
    style = {"color": _MARK[theme], "fontsize": 8, "va": "bottom"}
    # Paper behind the letters: curves pass under them.
    box = {"facecolor": _PAPER[theme], "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for label, y in marks.items():
        axes.axhline(y, color=_MARK[theme], lw=1, ls=(0, (1, 2)), zorder=1)
        axes.text(0.01, y, f"{label} {y:.3f}", style, bbox=box, transform=axes.get_yaxis_transform())


def _thousands(value: float, _: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
