"""Clips whose first latent frames are given clean: what a network sees there, and the velocity that leads there."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fv_distill.schedules import flow

from .conditioning import Conditioning, PreparedBatch

COLUMN = "first_frame_latent"
"""The data column of normalised latents `[C, k, H, W]`, as FastVideo's preprocessing writes it."""

# The column of a teacher's sampling paths `[steps, C, T, H, W]`, normalised, whose last state is a clip.
_PATHS = "trajectory_latents"

# Below it the way to a given frame is no longer divided by sigma: x_t is that frame up to float32's rounding.
_SMALLEST_SIGMA = 1e-6


def check_condition_frames(count: int, num_frames: int | None = None) -> int:
    """The number of given frames, if it is one and leaves something to generate of a clip's latent frames.

    Raises:
        ValueError: otherwise.
    """
    if count < 0:
        raise ValueError(f"condition_frames={count} must not be negative; 0 is text-to-video")
    if num_frames is not None and count >= num_frames:
        raise ValueError(
            f"models.<role>.condition_frames={count} leaves nothing to generate of {num_frames} latent frames"
        )
    return count


def hold_clips(columns: Container[str]) -> bool:
    """Whether rows of these columns hold clips, or sampling paths that lead to some."""
    return "vae_latent" in columns or _PATHS in columns


def check_clean_column(shapes: Mapping[str, Sequence[int]], latent_shape: Sequence[int], count: int) -> None:
    """Raise a `ValueError` if rows, here their tensors' shapes by column, don't have what `give_frames` takes."""
    channels, _, height, width = latent_shape
    if count == 0 or hold_clips(shapes):
        return
    if tuple(shapes.get(COLUMN, ())) != (channels, count, height, width):
        raise ValueError(
            f"{count} latent frames are given (models.<role>.condition_frames), but the rows hold neither clips nor a "
            f"{COLUMN} of the shape "
            f"{(channels, count, height, width)}"
        )


def give_frames(
    conditioning: Conditioning, batch: Mapping[str, Any], count: int, normalize: Callable[[Tensor], Tensor]
) -> Conditioning:
    """A batch's conditioning with its first `count` latent frames, normalised, or without any for 0.

    They are the clips' own where the rows hold clips or the paths that lead to some, which is right for a causal VAE,
    and else the column's.

    Args:
        conditioning: of the batch.
        batch: as the data loader makes it.
        count: how many are given.
        normalize: the adapter's `normalize_latents`.

    Raises:
        ValueError: if the rows have none of these.
    """
    extras = {name: value for name, value in conditioning.extras.items() if name != COLUMN}
    if count == 0:
        return replace(conditioning, extras=extras)
    if "vae_latent" in batch:
        frames = normalize(batch["vae_latent"][:, :, :count])
    elif _PATHS in batch:
        frames = batch[_PATHS][:, -1, :, :count].float()
    elif COLUMN in batch and batch[COLUMN].shape[2] == count:
        frames = batch[COLUMN].float()
    else:
        raise ValueError(f"the rows hold neither clips nor a {COLUMN} of {count} latent frames, which are given here")
    return replace(conditioning, extras={**extras, COLUMN: frames})


def begin_with_given(prepared: PreparedBatch) -> PreparedBatch:
    """Clips whose first frames are the given ones, where these were encoded by themselves: no loss counts them."""
    given = prepared.conditioning.extras[COLUMN].float()
    return replace(prepared, latents=torch.cat([given, prepared.latents[:, :, given.shape[2] :]], dim=2))


def put_in_place(x_t: Tensor, sigma: Tensor, given: Tensor, *, level: float = 0.0) -> tuple[Tensor, Tensor]:
    """Given frames `[B, C, k, H, W]` in the place of `x_t`'s first, and sigma as `[B, T]`, fp32, `level` there."""
    levels = flow.per_frame(sigma, x_t)
    count = given.shape[2]
    levels = torch.cat([torch.full_like(levels[:, :count], level), levels[:, count:]], dim=1)
    return torch.cat([given.to(x_t.dtype), x_t[:, :, count:]], dim=2), levels


def lead_to(given: Tensor, x_t: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """A network's velocity with `(x_t - given) / sigma` for the given frames, so that x0 is what was given."""
    count = given.shape[2]
    levels = flow.per_frame(sigma, x_t)[:, None, :count, None, None]
    difference = x_t[:, :, :count].float() - given.float()
    # At sigma 0 there is no way left to go.
    known = torch.where(levels > 0, difference / levels.clamp(min=_SMALLEST_SIGMA), 0.0)
    return torch.cat([known, velocity[:, :, count:]], dim=2)
