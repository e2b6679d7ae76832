"""What is drawn where: artists of the figures against the values that they stand for."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hbert.data import HbertError
from hbert.reporting.lines import Line, LineChart, spread_apart
from hbert.reporting.rows import Group, Point, Row, RowChart
from hbert.reporting.style import THEMES, Series, save_chart, short

LIGHT = THEMES["light"]
OURS, PEER, CEILING = Series("ours", 0), Series("a peer", 1, peer=True), Series("ceiling", 0)


def drawn(chart):
    figure = Figure(figsize=(5.4, chart.height), layout="constrained")
    chart.draw(figure, LIGHT)
    figure.draw_without_rendering()
    return figure.axes[0]


def intervals(axes):
    """(x, y) of both ends of each error bar."""
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    return [segment.tolist() for bar in bars for segment in bar[2][0].get_segments()]


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_lines_and_their_intervals():
    chart = LineChart("tokens", "ms", [
        Line(OURS, [128, 512], [1.0, 3.0], [0.5, 2.0], [1.5, 5.0]), Line(PEER, [128, 512], [2.0, 9.0])
    ], log=True, ticks=[128, 512])  # fmt: skip
    axes = drawn(chart)
    assert axes.lines[-1].get_xydata().tolist() == [[128, 2], [512, 9]]
    assert intervals(axes) == [[[128, 0.5], [128, 1.5]], [[512, 2.0], [512, 5.0]]]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["128", "512"]
    assert labels(axes) == ["ours", "a peer"]
    assert axes.lines[-1].get_linestyle() == "--" and axes.lines[0].get_linestyle() == "-"


def test_named_points_have_no_curve_and_their_names_beside_them():
    axes = drawn(LineChart("x", "y", [Line(OURS, [1, 5], [1, 5], names=["a", "b"]), Line(PEER, [0, 9], [0, 9])]))
    dots = axes.lines[0]
    assert (dots.get_linestyle(), dots.get_marker(), dots.get_xydata().tolist()) == ("None", "o", [[1, 1], [5, 5]])
    for name, point in {"a": (1, 1), "b": (5, 5)}.items():
        (box,) = [text.get_window_extent() for text in axes.texts if text.get_text() == name]
        assert math.dist((box.x0 + box.x1, box.y0 + box.y1), 2 * axes.transData.transform(point)) < 40


def test_names_stand_in_the_order_of_the_ends_without_touching():
    lines = [Line(Series(f"line {index}", index), [1, 2], [1, 1 + index / 100]) for index in range(8)]
    axes = drawn(LineChart("x", "y", [*lines[4:], *lines[:4]]))
    heights = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without the hair
    boxes = [heights[f"line {index}"] for index in range(8)]
    assert all(above.y0 >= below.y1 - 1 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(box.x0 > axes.bbox.x1 for box in boxes)


def test_the_name_of_a_short_line_stands_beside_its_end():
    axes = drawn(LineChart("x", "y", [Line(OURS, [0, 10], [0, 1]), Line(PEER, [0, 2], [0, 0.5])]))
    (label,) = [text for text in axes.texts if text.get_text() == "a peer"]
    x, y = axes.transData.transform((2, 0.5))
    box = label.get_window_extent()
    assert 0 < box.x0 - x < 20 and box.y0 < y < box.y1 and label.arrow_patch is None


def test_long_or_many_names_go_to_a_legend_that_has_room():
    few = LineChart("x", "y", [Line(Series("n" * 30, 0), [1, 2], [1, 2])])
    many = LineChart("x", "y", [Line(Series(f"n{index}", index), [1, 2], [1, 2]) for index in range(20)])
    for chart, names in ((few, 1), (many, 20)):
        figure = Figure(figsize=(5.4, chart.height), layout="constrained")
        chart.draw(figure, LIGHT)
        (legend,) = figure.legends
        assert len(legend.get_texts()) == names
    assert many.height > few.height


def test_a_line_without_numbers_has_no_name():
    axes = drawn(LineChart("x", "y", [Line(OURS, [1, 2], [math.nan] * 2), Line(PEER, [1, 2], [3, math.nan])]))
    assert labels(axes) == ["a peer"]


def test_names_are_no_formulas():
    name = "$x^{ \\frac $_"
    axes = LineChart("x", "y", [Line(Series(name, 0), [1, 2], [1, 2])])
    assert labels(drawn_with_style(axes)) == [name]


def drawn_with_style(chart):
    """As save_chart does it: formulas are read while drawing, and one that is none raises."""
    import matplotlib

    from hbert.reporting.style import _settings

    with matplotlib.rc_context(_settings(LIGHT)):
        return drawn(chart)


def test_bars_start_at_zero_and_have_intervals():
    chart = RowChart("ms", [
        Group("case", [Row("ours", [Point(OURS, 4.0, 3.0, 6.0), Point(CEILING, 2.0, limit=True)], "4.00"),
                       Row("a peer", [Point(PEER, 8.0)])]),
        Group("", [Row("once", [Point(OURS, 5.0, 5.0, 5.0)])]),
    ], bars=True)  # fmt: skip
    axes = drawn(chart)
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 4), (0, 8), (0, 5)]
    rows = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert rows == pytest.approx([-1, -2, -3])  # below the title of the first group
    assert intervals(axes) == [[[3, -1], [6, -1]]]  # a single measurement has none
    assert [text.get_text() for text in axes.get_yticklabels()] == ["case", "ours", "a peer", "once"]
    assert axes.get_xlim()[0] == 0 and "4.00" in labels(axes)
    (stroke,) = [line for line in axes.lines if line.get_marker() == "|" and line.get_markersize() > 10]
    assert stroke.get_xydata().tolist() == [[2, -1]]


def test_ratios_have_one_in_sight_and_at_a_tick():
    for values in ((1.2, 1.4), (0.6, 0.7), (0.4, 9.0), (2.0, 60.0), (0.004, 30.0)):
        rows = [Row("a name of some length", [Point(OURS, value, 0.95 * value, 1.05 * value)]) for value in values]
        axes = drawn(RowChart("ratio", [Group("", rows)], log=True, reference=1.0))
        low, high = axes.get_xlim()
        assert low <= 1 <= high and min(values) > low and max(values) < high
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert any(tick == pytest.approx(1) for tick in ticks) and len(ticks) >= 2
        numbers = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
        seen = sorted((box.x0, box.x1) for box in numbers if axes.bbox.x0 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1)
        assert all(after[0] > before[1] for before, after in zip(seen, seen[1:], strict=False))


def test_series_of_rows_are_named_once():
    rows = [Row(name, [Point(OURS, 1.0), Point(PEER, 2.0), Point(CEILING, 3.0, limit=True)]) for name in "ab"]
    figure = Figure()
    RowChart("GB/s", [Group("", rows)], legend=True).draw(figure, LIGHT)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "a peer", "ceiling"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.08))
def test_heights_that_are_moved_apart(heights, gap):
    moved = spread_apart(heights, gap)
    pairs = sorted(zip(heights, moved, strict=True))
    assert sorted(moved) == [after for _, after in sorted(pairs, key=lambda pair: pair[1])]
    ordered = sorted(moved)
    assert all(b - a >= gap - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert min(moved) >= -1e-9 and max(moved) <= 1 + 1e-9
    for (before, after), (later, then) in zip(pairs, pairs[1:], strict=False):
        assert before == later or after < then


def test_numbers_of_an_axis():
    found = [short(value) for value in (0, 0.25, 512, 2048, 20_000, 3_500_000, 2e9)]
    assert found == ["0", "0.25", "512", "2048", "20 k", "3.5 M", "2 B"]


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", THEMES)
def test_colours_can_be_seen(name):
    """WCAG 2.1: 3 for graphics, 4.5 for text."""
    theme = THEMES[name]
    assert min(contrast(colour, theme.paper) for colour in theme.series) >= 3
    assert contrast(theme.mark, theme.paper) >= 4.5 and contrast(theme.ink, theme.paper) >= 7


def test_pictures_of_both_themes(tmp_path):
    chart = RowChart("ms", [Group("", [Row("ours", [Point(OURS, 4.0)])])], bars=True)
    paths = save_chart(chart, tmp_path, "bars")
    assert {name: path.name for name, path in paths.items()} == {"light": "bars.png", "dark": "bars-dark.png"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars-dark.png", "bars.png"]
    first = {name: path.read_bytes() for name, path in paths.items()}
    for name, path in paths.items():
        with Image.open(path) as image:
            assert image.width == 864
            corner = image.convert("RGB").getpixel((0, 0))
        assert "#" + bytes(corner).hex() == THEMES[name].paper
    assert {name: path.read_bytes() for name, path in save_chart(chart, tmp_path, "bars").items()} == first


def test_without_matplotlib_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HbertError, match="pip install matplotlib"):
        save_chart(RowChart("ms", []), tmp_path, "bars")
    assert list(tmp_path.iterdir()) == []
