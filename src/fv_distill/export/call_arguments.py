"""The arguments that a pipeline has to be called with to make clips like those that a student was trained on."""

import inspect
from collections.abc import Collection, Sequence
from pathlib import Path

import diffusers

from fv_distill.models.pretrained import read_pipeline_class, read_vae_factors


def training_call_arguments(directory: Path, latent_shape: Sequence[int], *, text_length: int) -> dict[str, int]:
    """Size, frames and text length of the training clips, as the pipeline's arguments.

    Args:
        directory: the pipeline directory, whose VAE tells how much larger clips are than latents.
        latent_shape: `[C, T, H, W]` that was trained on.
        text_length: tokens that the prompts were padded to.
    """
    factor, spatial_factor = read_vae_factors(directory)
    _, frames, height, width = latent_shape
    call = {
        "height": height * spatial_factor,
        "width": width * spatial_factor,
        # The pipeline rounds to 4k + 1 by rounding down and adding 1, which without temporal folding is one too many.
        "num_frames": (frames - 1) * factor + (1 if factor > 1 else 0),
        "max_sequence_length": text_length,
    }
    accepted = _accepted_arguments(directory)
    return {key: value for key, value in call.items() if accepted is None or key in accepted}


def _accepted_arguments(directory: Path) -> Collection[str] | None:
    """What the directory's pipeline can be called with; None for one that diffusers doesn't have."""
    kind = getattr(diffusers, read_pipeline_class(directory), None)
    return None if kind is None else inspect.signature(kind.__call__).parameters
