"""Wan's VAE as a part of a pipeline, not of a directory: normalised latents and back, and the sizes of clips."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Raw latents, fp32, of pixels in [-1, 1]: the mode."""
    return vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()


def encode_normalized(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents, fp32, of pixels in [-1, 1]."""
    raw = encode_pixels(vae, pixels)
    mean, std = _statistics(vae, raw.device)
    return (raw - mean) / std


def decode_normalized(vae: Any, latents: Tensor) -> Tensor:
    """The video in [-1, 1] of normalised latents."""
    mean, std = _statistics(vae, latents.device)
    return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]


def check_clip_size(vae: Any, patch_size: Sequence[int], *, height: int, width: int, num_frames: int) -> None:
    """Raise a `ValueError` for pixels and frames that VAE and patches of a network don't fold without a rest."""
    config = vae.config
    for name, size, patch in (("height", height, patch_size[1]), ("width", width, patch_size[2])):
        if size % (patch * config.scale_factor_spatial):
            raise ValueError(f"{name}={size} must be a multiple of {patch * config.scale_factor_spatial}")
    if (num_frames - 1) % config.scale_factor_temporal:
        raise ValueError(f"num_frames={num_frames} must be a multiple of {config.scale_factor_temporal}, plus 1")


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, `[1, C, 1, 1, 1]`."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"], device=device) for name in ("mean", "std"))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
