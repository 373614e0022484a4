"""Clips of digits from a stock pipeline, and a row of results for them."""

from dataclasses import dataclass
from typing import Any

import torch
from metrics import Quality
from torch import Tensor

from fv_distill.data.digits import CANVAS, CAPTIONS, NUM_FRAMES, PATCH, TEXT_LENGTH

NOISE_SEED = 11
BATCH = 125


@dataclass(frozen=True)
class Row:
    """One way to make clips, and how good they are; `forward_passes` are network calls per clip."""

    name: str
    steps: int | None
    guidance: float | None
    forward_passes: int
    frechet_cnn: float
    frechet_pixel: float
    prompt_accuracy: float
    seconds: float


def make_row(
    name: str, steps: int | None, guidance: float | None, passes: int, quality: Quality, seconds: float
) -> Row:
    """A row with rounded figures."""
    return Row(
        name,
        steps,
        guidance,
        passes,
        round(quality.frechet_cnn, 3),
        round(quality.frechet_pixel, 3),
        round(quality.prompt_accuracy, 4),
        round(seconds, 1),
    )


def draw_noise(count: int, num_frames: int = NUM_FRAMES) -> Tensor:
    """The same for every way to make clips, `[N, 16, F, 4, 4]`."""
    shape = (count, PATCH * PATCH, num_frames, CANVAS // PATCH, CANVAS // PATCH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED))


def generate(pipeline: Any, captions: Tensor, noise: Tensor, *, steps: int, guidance: float) -> Tensor:
    """Clips `[N, 1, F, 16, 16]` in [-1, 1] from a stock pipeline, decoded by its VAE."""
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(NOISE_SEED)  # a re-noising scheduler draws from the global generator
    parts = []
    for caption, latents in zip(captions.split(BATCH), noise.split(BATCH), strict=True):
        frames = pipeline(
            [CAPTIONS[index] for index in caption.tolist()],
            height=CANVAS,
            width=CANVAS,
            num_frames=noise.shape[2],
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TEXT_LENGTH,
            latents=latents,
            output_type="pt",
        ).frames
        parts.append(frames.mean(2)[:, None] * 2 - 1)
    return torch.cat(parts)
