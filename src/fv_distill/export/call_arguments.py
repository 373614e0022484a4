"""The arguments that a pipeline has to be called with to make clips like those that a student was trained on."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fv_distill.models.pipeline_index import pipeline_class
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


def needs_image(kind: Any) -> bool:
    """Whether a pipeline can't be called without the first frame, `image`."""
    parameter = inspect.signature(kind.__call__).parameters.get("image")
    return parameter is not None and parameter.default is parameter.empty


def takes_image(kind: Any) -> bool:
    """Whether a pipeline can be called with a first frame, `image`."""
    return "image" in inspect.signature(kind.__call__).parameters


def pipeline_of(directory: Path, pipeline_config: Mapping[str, Any] | None = None) -> Any:
    """The class that a directory names, or `pipeline_config` in its stead; None if no such is known."""
    try:
        return pipeline_class(directory, pipeline_config)
    except ValueError:
        return None
