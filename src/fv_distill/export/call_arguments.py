"""The arguments that a pipeline has to be called with to make clips like those that a student was trained on."""

from collections.abc import Sequence
from pathlib import Path

from fv_distill.models.pretrained import load_component_config


def training_call_arguments(directory: Path, latent_shape: Sequence[int], *, text_length: int) -> dict[str, int]:
    """Size, frames and text length of the training clips, as the pipeline's arguments.

    Args:
        directory: the pipeline directory, whose VAE tells how much larger clips are than latents.
        latent_shape: `[C, T, H, W]` that was trained on.
        text_length: tokens that the prompts were padded to.
    """
    vae = load_component_config(directory, "vae")
    _, frames, height, width = latent_shape
    factor = vae["scale_factor_temporal"]
    return {
        "height": height * vae["scale_factor_spatial"],
        "width": width * vae["scale_factor_spatial"],
        # The pipeline rounds to 4k + 1 by rounding down and adding 1, which without temporal folding is one too many.
        "num_frames": (frames - 1) * factor + (1 if factor > 1 else 0),
        "max_sequence_length": text_length,
    }
