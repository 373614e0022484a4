"""Sizes that clips are brought to: one for all, or buckets of several aspect ratios."""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""Height and width in pixels."""

# From portrait to landscape, the ratios that cameras, screens and feeds have.
ASPECT_RATIOS = (9 / 21, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 21 / 9)


def parse_size(text: str) -> Size:
    """Height and width of "480x832".

    Raises:
        ValueError: for another text.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no size; write height x width in pixels, such as 480x832")
    return int(parts[0]), int(parts[1])


def make_buckets(max_area: int, multiple: int) -> list[Size]:
    """One size for each of `ASPECT_RATIOS` with at most `max_area` pixels, sides divisible by `multiple`.

    Raises:
        ValueError: if not even the smallest size has so few pixels.
    """
    sizes = set()
    for ratio in ASPECT_RATIOS:
        height = max(multiple, math.floor(math.sqrt(max_area / ratio) / multiple) * multiple)
        width = math.floor(min(height * ratio + multiple / 2, max_area / height) / multiple) * multiple
        if width > 0 and height * width <= max_area:
            sizes.add((height, width))
    if not sizes:
        raise ValueError(f"max-area: {max_area} pixels are less than the smallest clip, {multiple}x{multiple}")
    return sorted(sizes)


def choose_bucket(height: float, width: float, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest on a log scale, of several such the largest."""
    ratio = math.log(width / height)

    def distance(size: Size) -> tuple[float, int]:
        return round(abs(math.log(size[1] / size[0]) - ratio), 9), -size[0] * size[1]

    return min(buckets, key=distance)


def check_sizes(sizes: Sequence[Size], multiple: int, *, option: str) -> None:
    """Raise a ValueError for a size whose sides the VAE and the network's patches don't divide."""
    for height, width in sizes:
        if height % multiple or width % multiple:
            near = f"{max(1, round(height / multiple)) * multiple}x{max(1, round(width / multiple)) * multiple}"
            raise ValueError(
                f"{option}: {height}x{width} does not divide by {multiple}, which this model's VAE and patches need; "
                f"the nearest size is {near}"
            )
