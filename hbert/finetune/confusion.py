"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hbert.data.storage import replacing

_DPI = 110
_LONGEST_SIDE = 60.0  # inches
_SHOWN_CHARACTERS = 28


def save_confusion_plot(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Writes counts [C, C] (row = label, column = prediction) as a PNG, coloured by the share of the row.

    The picture grows with the number of classes so that each keeps a readable name, and every cell that is
    not zero its count, up to about 250 classes.

    Raises:
        OSError: the file cannot be written.
    """
    # Names of labels are no formulas, whatever is in them and in the user's matplotlibrc.
    plain = matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})
    with plain, replacing(path) as temporary:
        # No version of matplotlib in the file: the same counts give the same bytes.
        _drawn(confusion, names).savefig(temporary, format="png", metadata={"Software": None})


def _drawn(confusion: np.ndarray, names: Sequence[str]) -> Figure:
    num_classes = len(names)
    cell = min(0.6 if num_classes <= 12 else 0.24, _LONGEST_SIDE / num_classes)
    font = min(9.0, 30 * cell)
    shown = [name if len(name) <= _SHOWN_CHARACTERS else f"{name[: _SHOWN_CHARACTERS - 1]}…" for name in names]
    margin = 1.1 + 0.0095 * font * max(map(len, shown))
    figure = Figure((cell * num_classes + margin, cell * num_classes + margin), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(num_classes), shown, rotation=90, fontsize=font)
    axes.set_yticks(range(num_classes), shown, fontsize=font)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.tick_params(length=0)
    _write_counts(axes, confusion, shares, 0.8 * font)
    return figure


def _write_counts(axes: Axes, confusion: np.ndarray, shares: np.ndarray, font: float) -> None:
    for row, column in np.argwhere(confusion):
        ink = "white" if shares[row, column] > 0.5 else "#24292f"
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=font, color=ink)
