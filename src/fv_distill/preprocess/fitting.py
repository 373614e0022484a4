"""A frame at its final size: upright, square pixels, cropped or letterboxed."""

from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.video.reformatter import Interpolation

from .buckets import Size

# Beyond it a crop would keep next to nothing of the picture.
_MAX_ASPECT_CHANGE = 8.0


def display_size(picture: av.VideoFrame, pixel_aspect: Fraction) -> tuple[float, float]:
    """Height and width as shown, in units of the pixels' height."""
    height, width = float(picture.height), float(picture.width * pixel_aspect)
    return (width, height) if _quarter_turns(picture) % 2 else (height, width)


def fit_frame(
    picture: av.VideoFrame, size: Size, *, crop: Literal["center", "letterbox"], pixel_aspect: Fraction
) -> np.ndarray:
    """The frame as uint8 `[H, W, 3]`: turned as its display matrix says, scaled evenly, its middle kept.

    Raises:
        ValueError: if its aspect ratio is more than 8 times the size's, or the other way round.
    """
    height, width = size
    shown_height, shown_width = display_size(picture, pixel_aspect)
    scales = height / shown_height, width / shown_width
    if max(scales) > _MAX_ASPECT_CHANGE * min(scales):
        raise ValueError(f"{shown_width:g} x {shown_height:g} is too far from {width} x {height}")
    scale = max(scales) if crop == "center" else min(scales)
    limit = max if crop == "center" else min
    scaled_height = max(1, limit(height, round(shown_height * scale)))
    scaled_width = max(1, limit(width, round(shown_width * scale)))
    turns = _quarter_turns(picture)
    stored = (scaled_height, scaled_width) if turns % 2 == 0 else (scaled_width, scaled_height)
    scaled = picture.reformat(
        width=stored[1], height=stored[0], format="rgb24", interpolation=Interpolation.BICUBIC
    ).to_ndarray()
    upright = np.rot90(scaled, turns)
    top, left = abs(scaled_height - height) // 2, abs(scaled_width - width) // 2
    if crop == "center":
        return np.ascontiguousarray(upright[top : top + height, left : left + width])
    boxed = np.zeros((height, width, 3), dtype=np.uint8)
    boxed[top : top + scaled_height, left : left + scaled_width] = upright
    return boxed


def _quarter_turns(picture: av.VideoFrame) -> int:
    """Turns by 90 degrees, counter-clockwise, that make the picture upright."""
    return round(picture.rotation / 90) % 4
