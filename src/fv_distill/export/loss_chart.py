"""A small chart of a run's losses. Drawn with Pillow, which is always there; the Hub shows PNG wherever a card is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 28, 28
# Drawn larger and scaled down: Pillow's lines have no smooth edges.
_SCALE = 3
_MAX_POINTS = 400
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GRID, _TEXT = "#D8D8D8", "#333333"


def draw_losses(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Image.Image:
    """One curve per role over the steps, with a logarithmic scale where all values are positive.

    Args:
        losses: finite `(step, value)` pairs by role, at least one role with at least one pair. Long runs are drawn as
            means over stretches.
    """
    curves = {name: _averaged(points) for name, points in losses.items()}
    axes = _Axes.around([point for points in curves.values() for point in points])
    image = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12 * _SCALE)
    _draw_grid(draw, font, axes)
    left = float(_LEFT * _SCALE)
    for index, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = [axes.place(step, axes.level(value)) for step, value in points]
        if len(line) == 1:
            line.append((line[0][0] + 4 * _SCALE, line[0][1]))
        draw.line(line, fill=colour, width=2 * _SCALE, joint="curve")
        draw.text((left, 6 * _SCALE), f"loss/{name}", colour, font)
        left += font.getlength(f"loss/{name}") + 24 * _SCALE
    return image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Axes:
    first: float
    last: float
    low: float
    high: float
    is_log: bool

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> "_Axes":
        steps, values = [step for step, _ in points], [value for _, value in points]
        is_log = min(values) > 0
        low, high = (math.log10(bound) if is_log else bound for bound in (min(values), max(values)))
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        return cls(min(steps), max(max(steps), min(steps) + 1), low, high, is_log)

    def level(self, value: float) -> float:
        """Where a value is on the vertical axis, between `low` and `high`."""
        return math.log10(value) if self.is_log else value

    def place(self, step: float, level: float) -> tuple[float, float]:
        """In pixels of the enlarged picture."""
        x = _LEFT + (step - self.first) / (self.last - self.first) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (self.high - level) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM)
        return x * _SCALE, y * _SCALE


def _draw_grid(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, axes: _Axes) -> None:
    """Five levels, and the first and last step."""
    for level in (axes.low + (axes.high - axes.low) * part / 4 for part in range(5)):
        left, right = axes.place(axes.first, level), axes.place(axes.last, level)
        draw.line([left, right], fill=_GRID, width=_SCALE)
        text = f"{10**level if axes.is_log else level:.3g}"
        draw.text((left[0] - 6 * _SCALE, left[1]), text, _TEXT, font, anchor="rm")
    for step, anchor in ((axes.first, "la"), (axes.last, "ra")):
        x, y = axes.place(step, axes.low)
        draw.text((x, y + 6 * _SCALE), f"step {step:.0f}", _TEXT, font, anchor=anchor)


def _averaged(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points: the mean step and value of as many stretches."""
    size = -(-len(points) // _MAX_POINTS)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in stretches]
