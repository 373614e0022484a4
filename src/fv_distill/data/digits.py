"""The embedded data set: clips of real handwritten digits that move, captioned in words.

The images are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin & Kaynak
1998, CC BY 4.0): 1,797 grey 8 x 8 scans. A caption fixes the digit and its direction; the hand, the lane and the speed
are left open, so that a caption has many right answers and a sampler with too few steps shows their blurred average.

There are two motions. "wall" digits start at a wall and end before the opposite one. "wrap" digits leave at one side
and come back at the other, for clips of any length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")
NUM_FRAMES = 5
CANVAS = 16
DIGIT_SIZE = 8
PATCH = 4
"""Latents are the clip folded by this factor: `PATCH`^2 channels at 1/`PATCH` of the size."""

TEXT_LENGTH = 8
"""Tokens that hold every caption with its end mark."""

FPS = 4
LANES = (0, 2, 4, 6, 8)
"""Places across the captioned direction."""

SPEEDS = (1, 2)
"""Pixels a frame along it, away from the wall where the digit starts."""

Motion = Literal["wall", "wrap"]

WRAP_LANES = (0, 4, 8)
WRAP_SPEED = 4
"""Pixels a frame, as many as a latent cell has."""

WRAP_PERIOD = CANVAS // WRAP_SPEED
"""Frames until a digit is back where it started."""

_TRAVEL = CANVAS - DIGIT_SIZE

CAPTIONS = tuple(f"a handwritten {word} moving {direction}" for word in DIGIT_WORDS for direction in DIRECTIONS)


@dataclass(frozen=True)
class DigitClips:
    """Clips in [-1, 1], fp32 `[N, 1, F, 16, 16]`, and the index of each one's caption in `CAPTIONS`."""

    clips: Tensor
    captions: Tensor


def digit_images(split: str) -> tuple[Tensor, Tensor]:
    """Grey images in [0, 1], fp32 `[N, 8, 8]`, and their digits; `split` is "train" (3 of 4) or "held_out".

    Raises:
        ValueError: for another split.
        ImportError: if scikit-learn is missing.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r} is neither train nor held_out")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'fv_distill[digits]'") from error
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32)
    digits = torch.tensor(bunch.target, dtype=torch.long)
    held_out = torch.arange(len(images)) % 4 == 3
    chosen = held_out if split == "held_out" else ~held_out
    return images[chosen], digits[chosen]


def sample_clips(
    split: str,
    count: int,
    generator: torch.Generator,
    *,
    motion: Motion = "wall",
    frames: Sequence[int] = range(NUM_FRAMES),
) -> DigitClips:
    """Draw `count` clips with all that their captions leave open: image, lane and, away from a wall, speed.

    Args:
        split: see `digit_images`.
        count: N.
        generator: what is drawn depends on it alone, not on `frames`.
        motion: "wall" or "wrap".
        frames: which frames of the clips to show, from 0; "wall" has 5, "wrap" as many as you like.

    Raises:
        ValueError: for another split or motion, or a frame that does not exist.
    """
    if motion not in get_args(Motion):
        raise ValueError(f"motion={motion!r} is none of {', '.join(get_args(Motion))}")
    if motion == "wall" and not set(frames) <= set(range(NUM_FRAMES)):
        raise ValueError(f"frames={list(frames)}, but a clip that ends at a wall has only {NUM_FRAMES}: 0 to 4")
    images, digits = digit_images(split)
    chosen = torch.randint(len(images), (count,), generator=generator)
    direction = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    index = torch.tensor(list(frames))
    place = _between_walls if motion == "wall" else _around
    along, lane = place(direction % 2 == 1, index, generator)
    across = lane[:, None].expand_as(along)
    is_horizontal = (direction < 2)[:, None]
    rows, columns = torch.where(is_horizontal, across, along), torch.where(is_horizontal, along, across)
    square = torch.arange(DIGIT_SIZE)
    clips = torch.full((count, len(index), CANVAS, CANVAS), -1.0)
    for frame in range(len(index)):
        row = (rows[:, frame, None] + square)[:, :, None] % CANVAS
        column = (columns[:, frame, None] + square)[:, None, :] % CANVAS
        clips[torch.arange(count)[:, None, None], frame, row, column] = images[chosen] * 2 - 1
    return DigitClips(clips[:, None], digits[chosen] * len(DIRECTIONS) + direction)


def _between_walls(is_forward: Tensor, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where the digits are along their direction `[N, F]`, and their lanes `[N]`."""
    lane = _draw(LANES, len(is_forward), generator)
    gone = _draw(SPEEDS, len(is_forward), generator)[:, None] * frames
    return torch.where(is_forward[:, None], gone, _TRAVEL - gone), lane


def _around(is_forward: Tensor, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same for digits that come back at the other side."""
    lane = _draw(WRAP_LANES, len(is_forward), generator)
    gone = WRAP_SPEED * frames
    return torch.where(is_forward[:, None], gone, _TRAVEL - gone) % CANVAS, lane


def _draw(values: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]


def to_latents(clips: Tensor) -> Tensor:
    """Fold space into channels: `[N, 1, F, 16, 16]` to `[N, 16, F, 4, 4]`."""
    count, _, frames, height, width = clips.shape
    folded = clips.reshape(count, frames, height // PATCH, PATCH, width // PATCH, PATCH)
    # The channel order is the one of AutoencoderKLWan's patchify: width within the patch first.
    return folded.permute(0, 5, 3, 1, 2, 4).reshape(count, PATCH * PATCH, frames, height // PATCH, width // PATCH)


def from_latents(latents: Tensor) -> Tensor:
    """The inverse of `to_latents`."""
    count, _, frames, height, width = latents.shape
    unfolded = latents.reshape(count, PATCH, PATCH, frames, height, width).permute(0, 3, 4, 2, 5, 1)
    return unfolded.reshape(count, 1, frames, height * PATCH, width * PATCH)
