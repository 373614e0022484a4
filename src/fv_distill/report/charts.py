"""Curves as the numbers that an SVG needs; the template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Points = Sequence[tuple[int, float]]

# Paths live in a square of this side, which the page stretches to any size.
SIDE = 1000
# Curves with more points are cut into so many pieces, of each of which the extremes are drawn.
MAX_PIECES = 400
# A curve is averaged over this share of its points.
_SMOOTHING_SHARE = 1 / 20
# Beyond this ratio of the largest to the smallest value a linear axis would show the largest only.
_LOG_RATIO = 50


@dataclass(frozen=True)
class Tick:
    """A label and its place along an axis, in percent from the left or the bottom."""

    label: str
    place: float


@dataclass(frozen=True)
class Axis:
    """The range of an axis, and how numbers become places."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end; may lie outside."""
        low, high, value = (math.log(max(x, 1e-300)) if self.is_log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self, count: int) -> list[Tick]:
        """About `count` round numbers within the range."""
        values = _log_values(self.low, self.high) if self.is_log else []
        if len(values) < 2:
            values = _round_values(self.low, self.high, count)
        return [Tick(format_number(value), 100 * self.place(value)) for value in values]


@dataclass(frozen=True)
class LineChart:
    """One curve: all of its values thin, their running average thick."""

    title: str
    summary: str
    latest: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    raw_path: str
    smooth_path: str
    note: str
    marks: list[float]
    """Places of values that aren't finite, in percent."""
    hover: dict[str, Any] = field(default_factory=dict)
    """For the page's script: the range of steps, and [step, average, least, greatest] for each piece."""


def line_chart(title: str, points: Points, *, steps: tuple[int, int], is_noisy: bool = True) -> LineChart:
    """Lay out a curve.

    Args:
        title: the metric's name.
        points: (step, value) by rising step; values that aren't finite become marks.
        steps: first and last step of the axis.
        is_noisy: draw the running average too, and take a logarithmic axis for values of very different size. False
            for what is exact, such as a learning rate.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    x_axis = Axis(steps[0], max(steps[1], steps[0] + 1))
    marks = [100 * x_axis.place(step) for step, value in points if not math.isfinite(value)]
    if not finite:
        return LineChart(title, f"{title}: no finite value", "-", x_axis.ticks(5), [], "", "", "no finite value", marks)
    span = max(1, round(len(finite) * _SMOOTHING_SHARE)) if is_noisy else 1
    averaged = smoothed([value for _, value in finite], span)
    y_axis = _value_axis([value for _, value in finite], averaged, allow_log=is_noisy)
    pieces = _pieces(finite, averaged)
    raw = [point for step, _, low, high in pieces for point in ((step, low), (step, high))]
    outside = sum(not -1e-9 <= y_axis.place(value) <= 1 + 1e-9 for _, value in finite)
    notes = [f"average over {span} updates"] if span > 1 else []
    notes += ["logarithmic"] if y_axis.is_log else []
    notes += [f"{outside} of {len(finite)} values outside"] if outside else []
    notes += [f"{len(marks)} not finite"] if marks else []
    first, last = finite[0], (finite[-1][0], averaged[-1])
    return LineChart(
        title=title,
        summary=f"{title}: {format_number(first[1])} at step {first[0]}, {format_number(last[1])} at step {last[0]}",
        latest=format_number(averaged[-1]),
        x_ticks=x_axis.ticks(5),
        y_ticks=y_axis.ticks(4),
        raw_path=polyline(raw, x_axis, y_axis) if span > 1 else "",
        smooth_path=polyline([(step, value) for step, value, _, _ in pieces], x_axis, y_axis),
        note=", ".join(notes),
        marks=marks,
        hover={
            "steps": [x_axis.low, x_axis.high],
            "y": [y_axis.low, y_axis.high, int(y_axis.is_log)],
            "points": [[step, *(_significant(x) for x in values)] for step, *values in pieces],
        },
    )


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """The exponential average that weighs the last `span` values most, without the pull of a made-up start."""
    keep = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def polyline(points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    """An SVG path through points in the square."""
    # Values outside are drawn up to a little beyond the edge, where the page cuts them off.
    places = [
        (SIDE * x_axis.place(x), SIDE * (1 - min(1.2, max(-0.2, y_axis.place(y))))) for x, y in points if y is not None
    ]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""


def value_axis(values: Sequence[float]) -> Axis:
    """An axis that holds all values, logarithmic where they are of very different size."""
    return _value_axis(values, values, allow_log=True)


def format_number(value: float) -> str:
    """Four significant digits, with an exponent where zeros would hide the size."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _pieces(points: Points, averaged: Sequence[float]) -> list[tuple[int, float, float, float]]:
    """(last step, average there, least value, greatest value) of at most MAX_PIECES runs of points."""
    size = math.ceil(len(points) / MAX_PIECES)
    pieces = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part]
        pieces.append((part[-1][0], averaged[start + len(part) - 1], min(values), max(values)))
    return pieces


def _value_axis(values: Sequence[float], averaged: Sequence[float], *, allow_log: bool) -> Axis:
    """All averages and all but the most extreme values: one spike must not flatten the rest."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = min(ordered[cut], *averaged, ordered[cut]), max(ordered[-1 - cut], *averaged)
    if allow_log and low > 0 and high / low > _LOG_RATIO:
        return Axis(low / 1.15, high * 1.15, is_log=True)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    # An axis that nearly reaches zero may as well show it.
    bottom = low - margin if low < 0 or low > 0.4 * high else 0.0
    return Axis(bottom, high + margin)


def _round_values(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = math.ceil(low / distance - 1e-9)
    values = [index * distance for index in range(first, first + 2 * count + 2)]
    # Rounded, or 3 * 0.1 would be written with all its digits.
    return [float(f"{value:.10g}") for value in values if value <= high + 1e-9 * distance]


def _log_values(low: float, high: float) -> list[float]:
    """Powers of ten, and their double and fivefold where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 300 else (1,)
    values = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in values if low <= value <= high]
    return inside[:: math.ceil(len(inside) / 6)] if inside else []


def _significant(value: float) -> float:
    return float(f"{value:.5g}")
