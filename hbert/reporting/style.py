"""The look of all figures: PNG files in a light and a dark version of the same colours, readable on a phone."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hbert.data.storage import replacing
from hbert.errors import HbertError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES = 5.4
NOTE_POINTS = 8  # of marks and values inside a figure; axes and names have _POINTS
_POINTS = 10
_DPI = 160
_PALETTE = 128
DASHES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class Theme:
    """Colours on one kind of paper; those of ``series`` are told apart by people with colour blindness too."""

    paper: str
    ink: str
    faint: str
    mark: str
    series: tuple[str, ...]

    def colour(self, index: int) -> str:
        """The colour of a series; behind the last one they start again."""
        return self.series[index % len(self.series)]


THEMES = {
    "light": Theme(
        paper="#ffffff", ink="#24292f", faint="#d8dde3", mark="#6a737d",
        series=("#0072b2", "#d55e00", "#009e73", "#b0558f", "#a87900", "#4a92c6", "#444444"),
    ),
    "dark": Theme(
        paper="#16181d", ink="#d7dce2", faint="#363b44", mark="#99a2ad",
        series=("#4cb0e8", "#ff8a4c", "#3dcb9f", "#e79bc4", "#f2c14e", "#a9d8f7", "#c8c8c8"),
    ),
}  # fmt: skip
_SUFFIXES = {"light": "", "dark": "-dark"}


@dataclass(frozen=True)
class Series:
    """What the points of one name look like.

    ``colour`` counts from 0. A ``peer``, which others are held against, is dashed and hollow.
    """

    label: str
    colour: int
    peer: bool = False


class Chart(Protocol):
    """Something that can be drawn on an empty figure of ``height`` inches."""

    @property
    def height(self) -> float: ...

    def draw(self, figure: Figure, theme: Theme) -> None: ...


def save_chart(chart: Chart, folder: Path, stem: str) -> dict[str, Path]:
    """Writes FOLDER/STEM.png and STEM-dark.png, 864 pixels wide, each complete or not at all.

    Returns:
        the paths, by the names of `THEMES`.

    Raises:
        HbertError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    paths = {name: folder / f"{stem}{suffix}.png" for name, suffix in _SUFFIXES.items()}
    for name, path in paths.items():
        _save(chart, path, THEMES[name])
    return paths


def _save(chart: Chart, path: Path, theme: Theme) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError as error:
        raise HbertError("drawing needs matplotlib: pip install matplotlib") from error
    drawn = io.BytesIO()
    with matplotlib.rc_context(_settings(theme)):
        figure = Figure(figsize=(WIDTH_INCHES, chart.height), dpi=_DPI, layout="constrained")
        chart.draw(figure, theme)
        # No version of matplotlib in the file: the same chart gives the same bytes.
        figure.savefig(drawn, format="png", metadata={"Software": None})
    with replacing(path) as temporary:
        # A quarter of the size: pages hold many figures, each twice.
        flat = Image.open(drawn).convert("RGB").quantize(_PALETTE, dither=Image.Dither.NONE)
        flat.save(temporary, format="png", optimize=True)


def short(value: float, _: float = 0) -> str:
    """A number for an axis: 250, 2048, 15 k, 20 M, 3 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _settings(theme: Theme) -> dict[Any, Any]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.ink)
    paper = dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), theme.paper)
    faint = dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), theme.faint)
    return (
        ink
        | paper
        | faint
        | {
            "font.size": _POINTS,
            # Names come from files and users: a dollar in one is a dollar.
            "text.parse_math": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "errorbar.capsize": 2,
        }
    )
