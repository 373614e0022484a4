"""The arguments that a pipeline has to be called with to make clips like those that a student was trained on."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from fv_distill.models.conditioning import ACTION_COLUMNS
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
    text = {"max_sequence_length": text_length} if "prompt" in pipeline_inputs(directory, {}) else {}
    return {
        "height": height * vae["scale_factor_spatial"],
        "width": width * vae["scale_factor_spatial"],
        # The pipeline rounds to 4k + 1 by rounding down and adding 1, which without temporal folding is one too many.
        "num_frames": (frames - 1) * factor + (1 if factor > 1 else 0),
        **text,
    }


def pipeline_inputs(directory: Path, condition_shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """What a directory's pipeline makes clips from; see `StudentInfo.inputs`.

    Args:
        directory: the pipeline directory.
        condition_shapes: of the training clips, by data column.
    """
    parameters = inspect.signature(pipeline_class(directory).__call__).parameters
    if "prompt" in parameters:
        return {"prompt": []}
    actions = {name: list(condition_shapes[name]) for name in ACTION_COLUMNS if name in condition_shapes}
    return {"image": [], **{name: shape for name, shape in actions.items() if name in parameters}}
