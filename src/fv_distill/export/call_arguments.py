"""The arguments that a pipeline has to be called with to make clips like those that a student was trained on."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fv_distill.models.conditioning import ACTION_COLUMNS
from fv_distill.models.pipeline_index import find_pipeline, own_pipeline, read_index
from fv_distill.models.pretrained import read_vae_factors


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
    kind = pipeline_of(directory)
    accepted = None if kind is None else inspect.signature(kind.__call__).parameters
    return {key: value for key, value in call.items() if accepted is None or key in accepted}


def training_clip_size(directory: Path, latent_shape: Sequence[int]) -> tuple[int, int]:
    """Width and height of the training clips, whose latents have the shape `[C, T, H, W]`."""
    _, factor = read_vae_factors(directory)
    return latent_shape[3] * factor, latent_shape[2] * factor


def takes_prompt(pipeline_class: Any) -> bool:
    """Whether a pipeline can be called with a text; one that nobody here knows is taken for such."""
    return pipeline_class is None or "prompt" in inspect.signature(pipeline_class.__call__).parameters


def taken_actions(pipeline_class: Any, condition_shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The actions that a pipeline is called with, by data column, and their shapes among those of the conditions."""
    parameters = {} if pipeline_class is None else inspect.signature(pipeline_class.__call__).parameters
    found = [name for name in ACTION_COLUMNS if name in parameters and name in condition_shapes]
    return {name: list(condition_shapes[name]) for name in found}


def needs_image(kind: Any) -> bool:
    """Whether a pipeline can't be called without the first frame, `image`."""
    parameter = inspect.signature(kind.__call__).parameters.get("image")
    return parameter is not None and parameter.default is parameter.empty


def takes_image(kind: Any) -> bool:
    """Whether a pipeline can be called with a first frame, `image`."""
    return "image" in inspect.signature(kind.__call__).parameters


def pipeline_of(directory: Path, pipeline_config: Mapping[str, Any] | None = None) -> Any:
    """The class that a directory names, or `pipeline_config` in its stead; None if it is not known here."""
    return find_pipeline({**read_index(directory), **(pipeline_config or {})}["_class_name"])


def pipeline_target_of(directory: Path, pipeline_config: Mapping[str, Any] | None = None) -> str | None:
    """The dotted path of that class, in this library or in diffusers."""
    kind = pipeline_of(directory, pipeline_config)
    return None if kind is None else own_pipeline(directory, pipeline_config) or f"diffusers.{kind.__name__}"
