"""Numbers behind the curves."""

import math
import re

import pytest

from fv_distill.report.charts import MAX_PIECES, Axis, format_number, line_chart, smoothed
from fv_distill.report.sigma_chart import COLORS, MAX_COLUMNS, sigma_charts


def places(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"([\d.-]+) ([\d.-]+)", path)]


def test_the_average_is_the_weighted_mean_of_what_came_before():
    values, span = [3.0, 1.0, 4.0, 1.0, 5.0], 4
    weights = [(1 - 2 / (span + 1)) ** age for age in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, reversed(values), strict=True)) / sum(weights)
    assert smoothed(values, span)[-1] == pytest.approx(expected)
    assert smoothed(values, span)[0] == 3.0
    assert smoothed(values, 1) == values
    assert smoothed([2.5] * 9, 5) == pytest.approx([2.5] * 9)


def test_a_curve_lies_where_its_values_are():
    chart = line_chart("lr/x", [(0, 0.0), (5, 10.0), (10, 20.0)], steps=(0, 10), is_noisy=False)
    high = chart.hover["y"][1]
    expected = [(0, 1000), (500, 1000 * (1 - 10 / high)), (1000, 1000 * (1 - 20 / high))]
    assert places(chart.smooth_path) == [pytest.approx(place, abs=0.1) for place in expected]
    assert chart.raw_path == "" and chart.latest == "20"
    assert chart.hover["points"] == [[0, 0, 0, 0], [5, 10, 10, 10], [10, 20, 20, 20]]


def test_many_values_keep_their_extremes():
    points = [(step, 1.0 + (step == 7777)) for step in range(1, 20_001)]
    chart = line_chart("loss/x", points, steps=(1, 20_000))
    pieces = chart.hover["points"]
    assert len(pieces) <= MAX_PIECES and pieces[-1][0] == 20_000
    assert max(piece[3] for piece in pieces) == 2.0 and min(piece[2] for piece in pieces) == 1.0
    assert len(chart.raw_path) < 30 * 2 * MAX_PIECES


def test_a_spike_does_not_flatten_the_rest_and_is_counted():
    points = [(step, 1000.0 if step == 50 else 1 + 0.1 * math.sin(step)) for step in range(1, 1001)]
    chart = line_chart("loss/x", points, steps=(1, 1000))
    assert chart.hover["y"][1] < 200
    assert "1 of 1000 values outside" in chart.note


def test_values_that_are_not_finite_are_marks_and_gaps():
    points = [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)]
    chart = line_chart("loss/x", points, steps=(1, 5))
    assert chart.marks == [25.0, 50.0] and "2 not finite" in chart.note
    assert "nan" not in chart.smooth_path and "inf" not in chart.smooth_path
    empty = line_chart("loss/x", [(1, math.nan)], steps=(1, 5))
    assert (empty.smooth_path, empty.note) == ("", "no finite value")


@pytest.mark.parametrize("points", [[(3, 0.0)], [(3, -2.0)], [(1, 5.0), (2, 5.0)], [(1, 1e-12), (2, 3e-12)]])
def test_single_and_equal_values_have_an_axis(points):
    chart = line_chart("loss/x", points, steps=(points[0][0], points[-1][0]))
    assert len(chart.y_ticks) >= 2
    assert all(0 <= y <= 1000 for _, y in places(chart.smooth_path))


def test_very_different_values_get_a_logarithmic_axis():
    points = [(step, 10.0**-step) for step in range(5)]
    assert "logarithmic" in line_chart("loss/x", points, steps=(0, 4)).note
    assert "logarithmic" not in line_chart("lr/x", points, steps=(0, 4), is_noisy=False).note
    assert "logarithmic" not in line_chart("x", [(0, -1.0), (1, 1000.0)], steps=(0, 1)).note


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0", "0.25", "0.5", "0.75", "1"]),
        (0.02, 0.31, ["0.1", "0.2", "0.3"]),
        (1, 480, ["200", "400"]),
        (-1e-4, 1e-4, ["-0.0001", "-5e-5", "0", "5e-5", "0.0001"]),
    ],
)
def test_ticks_are_round_and_inside(low, high, labels):
    ticks = Axis(low, high).ticks(4)
    assert [tick.label for tick in ticks] == labels
    assert all(-0.01 <= tick.place <= 100.01 for tick in ticks)


def test_logarithmic_ticks():
    assert [tick.label for tick in Axis(0.05, 3, is_log=True).ticks(4)] == ["0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert [tick.label for tick in Axis(1e-4, 1e4, is_log=True).ticks(4)][:2] == ["0.0001", "0.01"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.12346, "0.1235"), (1e-5, "1e-5"), (123456, "1.23e5"), (12345, "12345"), (-3, "-3")]
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_a_map_merges_windows_by_their_counts():
    windows = [{"step": step, "x": {"loss": [float(step), None], "count": [step, 0]}} for step in range(1, 161)]
    (chart,) = sigma_charts(windows)
    assert (chart.num_columns, chart.num_bins) == (MAX_COLUMNS, 2)
    assert chart.hover["columns"][:2] == [[1, 2], [3, 4]]
    assert chart.hover["count"][1] == [7, 0]
    assert chart.hover["loss"][1] == [format_number((9 + 16) / 7), None]
    assert len(chart.cells) == MAX_COLUMNS and {cell.y for cell in chart.cells} == {1}
    assert (chart.cells[0].color, chart.cells[-1].color) == (COLORS[0], COLORS[-1])
    assert [curve.label for curve in chart.curves] == ["1 to 40", "41 to 80", "81 to 120", "121 to 160"]


def test_roles_without_samples_have_no_map():
    assert sigma_charts([]) == []
    assert sigma_charts([{"step": 5, "x": {"loss": [None], "count": [0]}, "partial": True}]) == []
