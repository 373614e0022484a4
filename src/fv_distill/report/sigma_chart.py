"""Losses by noise level: a map over the steps, and the curve against sigma at four times of the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Axis, Tick, format_number, polyline, value_axis

# More windows than this are merged, so that a column stays wide enough to see.
MAX_COLUMNS = 80
_NUM_CURVES = 4
# Dark for small and light for large, distinguishable without colour: nine steps of viridis (van der Walt and Smith).
COLORS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")


@dataclass(frozen=True)
class Cell:
    """A coloured rectangle of the map, in its own units: columns and rows."""

    x: float
    y: float
    width: float
    color: str


@dataclass(frozen=True)
class Curve:
    """Loss against sigma over some steps."""

    label: str
    path: str


@dataclass(frozen=True)
class SigmaChart:
    """Both pictures of one role."""

    name: str
    summary: str
    cells: list[Cell]
    num_columns: int
    num_bins: int
    x_ticks: list[Tick]
    sigma_ticks: list[Tick]
    legend: list[tuple[str, str]]
    curves: list[Curve]
    curve_ticks: list[Tick]
    curves_log: bool
    hover: dict[str, Any]


@dataclass
class _Column:
    """Windows from one step to another, with sums and counts per bin."""

    first: int
    last: int
    sums: list[float]
    counts: list[float]

    def means(self) -> list[float | None]:
        return [total / count if count else None for total, count in zip(self.sums, self.counts, strict=True)]


def sigma_charts(windows: Sequence[dict[str, Any]]) -> list[SigmaChart]:
    """A chart for each role of `sigma_losses.jsonl`; roles without a finite value have none."""
    names = dict.fromkeys(name for line in windows for name, value in line.items() if _is_bins(value))
    charts = [_chart(name, _columns(windows, name)) for name in names]
    return [chart for chart in charts if chart is not None]


def _is_bins(value: Any) -> bool:
    return isinstance(value, dict) and len(value.get("loss", ())) == len(value.get("count", ())) > 0


def _columns(windows: Sequence[dict[str, Any]], name: str) -> list[_Column]:
    columns: list[_Column] = []
    before = 0
    for line in windows:
        if _is_bins(line.get(name)):
            counts = [float(count) for count in line[name]["count"]]
            losses = [0.0 if loss is None else loss for loss in line[name]["loss"]]
            sums = [loss * count for loss, count in zip(losses, counts, strict=True)]
            columns.append(_Column(before + 1, line["step"], sums, counts))
        before = line["step"]
    return _merged(columns, MAX_COLUMNS)


def _merged(columns: list[_Column], limit: int) -> list[_Column]:
    """Neighbours put together until at most `limit` are left."""
    size = max(1, math.ceil(len(columns) / limit))
    groups = [columns[start : start + size] for start in range(0, len(columns), size)]
    return [
        _Column(
            group[0].first,
            group[-1].last,
            [sum(values) for values in zip(*(column.sums for column in group), strict=True)],
            [sum(values) for values in zip(*(column.counts for column in group), strict=True)],
        )
        for group in groups
    ]


def _chart(name: str, columns: list[_Column]) -> SigmaChart | None:
    means = [column.means() for column in columns]
    values = [value for row in means for value in row if value is not None and value > 0]
    if not values:
        return None
    num_bins = len(columns[0].counts)
    low, high = min(values), max(values)
    scale = Axis(low, high * (1 + 1e-9), is_log=True)
    cells = [
        Cell(x, num_bins - 1 - y, 1, _color(scale, value))
        for x, row in enumerate(means)
        for y, value in enumerate(row)
        if value is not None
    ]
    curves = _merged(columns, _NUM_CURVES)
    curve_means = [curve.means() for curve in curves]
    y_axis = value_axis([value for row in curve_means for value in row if value is not None])
    return SigmaChart(
        name=name,
        summary=f"{name}: losses of {format_number(low)} to {format_number(high)} in {num_bins} bins of sigma, "
        f"steps {columns[0].first} to {columns[-1].last}",
        cells=cells,
        num_columns=len(columns),
        num_bins=num_bins,
        x_ticks=_step_ticks(columns),
        sigma_ticks=[Tick(f"{tick / 5:.1f}".rstrip("0").rstrip(".") or "0", 20.0 * tick) for tick in range(6)],
        legend=[(color, format_number(low * (high / low) ** (i / 8))) for i, color in enumerate(COLORS)],
        curves=[
            Curve(f"{curve.first} to {curve.last}", _curve_path(row, y_axis))
            for curve, row in zip(curves, curve_means, strict=True)
        ],
        curve_ticks=y_axis.ticks(4),
        curves_log=y_axis.is_log,
        hover={
            "bins": num_bins,
            "columns": [[column.first, column.last] for column in columns],
            "loss": [[None if value is None else format_number(value) for value in row] for row in means],
            "count": [[round(count) for count in column.counts] for column in columns],
        },
    )


def _color(scale: Axis, value: float) -> str:
    place = scale.place(value) if scale.high > scale.low * (1 + 1e-6) and value > 0 else 0.0
    return COLORS[min(len(COLORS) - 1, int(place * len(COLORS)))]


def _curve_path(means: list[float | None], y_axis: Axis) -> str:
    """Through the middles of the bins."""
    num_bins = len(means)
    points = [((index + 0.5) / num_bins, value) for index, value in enumerate(means) if value is not None]
    return polyline(points, Axis(0, 1), y_axis)


def _step_ticks(columns: list[_Column]) -> list[Tick]:
    """The last step of some columns, at their right edges."""
    every = math.ceil(len(columns) / 5)
    shown = range(every - 1, len(columns), every)
    return [Tick(str(columns[index].last), 100 * (index + 1) / len(columns)) for index in shown]
