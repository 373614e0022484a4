"""From published Matrix-Game 2 weights to a pipeline directory: the `fv-distill convert-matrixgame2` command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from fv_distill.models.pipeline_index import own_network, write_index
from fv_distill.models.pretrained import check_weights_fit, parse_dtype, resolve_directory
from fv_distill.schedules.few_step import few_step_sigmas

from .diffusers_dir import cast_weights, check_output, pipeline_directory
from .matrixgame2_keys import NETWORK_CLASS, convert_state_dict, convert_state_dict_to_published, network_config
from .student_info import StudentInfo, write_info
from .wan_checkpoint import read_original_checkpoint

# Of all published inference configs, as what follows: timestep_shift.
FLOW_SHIFT = 5.0
# image_or_video_shape [1, 16, 15, 44, 80].
_CALL = {"height": 352, "width": 640, "num_frames": 57}
# num_frame_per_block.
_CHUNK_SIZE = 3
# denoising_step_list, warped; that of the Temple Run model, which has no mouse, has a step more.
_STEPS = (1000, 666, 333)
_STEPS_WITHOUT_MOUSE = (1000, 750, 500, 250)
# Where the published repository has a variant's config, beside its weights.
_CONFIG_FILES = ("config.json", "base_config.json")
_PARTS = ("vae", "image_encoder")
_INDEX: dict[str, Any] = {
    "_class_name": "MatrixGame2Pipeline",
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["fv_distill.models.transformers.matrixgame2", NETWORK_CLASS],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_CARD = """\
---
library_name: diffusers
base_model: Skywork/Matrix-Game-2.0
license: mit
pipeline_tag: image-to-video
tags: [fv_distill, image-to-video, matrix-game]
---

# {name}

The weights of `{source}`, renamed by `fv-distill convert-matrixgame2`. VAE and image encoder are those of
`{base_model}`.
`fv_distill.models.pipelines.MatrixGame2Pipeline` and `fv-distill generate` sample it.
"""


def convert_matrixgame2_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    base_model: str,
    config: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    sigmas: Sequence[float] | None = None,
) -> Path:
    """Make a pipeline directory of published Matrix-Game 2 weights.

    Where the config has a `local_attn_size` the network is causal, and how to stream it is written beside it: chunks of
    3 latent frames that see `local_attn_size` frames, themselves included.

    Args:
        checkpoint: a `.safetensors` file of the published repository, or the directory that holds it alone.
        output_dir: the directory to write, whole or not at all.
        base_model: a diffusers directory or Hub id whose `vae` and `image_encoder` are taken: that of Wan 2.1
            image-to-video, Wan-AI/Wan2.1-I2V-14B-480P-Diffusers, which Matrix-Game 2 shares.
        config: the published `config.json`; None looks beside the weights.
        dtype: "float32", "bfloat16" or "float16" for the written network; None keeps the weights' own.
        overwrite: replace an existing directory.
        sigmas: the few levels that a causal network was distilled to, falling from 1; None are the published ones.

    Raises:
        FileNotFoundError: if weights, config or base model aren't there.
        FileExistsError: if the output directory isn't empty, and `overwrite` is off or it is no pipeline directory.
        ValueError: if the weights can't be read, or listing the keys, in the published names, that are missing,
            unexpected or of another shape.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    to_dtype = None if dtype is None else parse_dtype(dtype)
    published = json.loads(_config_file(checkpoint, config).read_text())
    base = _encoders_directory(base_model)
    check_output(output_dir, base, overwrite=overwrite)
    network: Any = own_network(NETWORK_CLASS, network_config(published))
    original = read_original_checkpoint(checkpoint)
    _check_fits(original.weights, network, str(checkpoint))
    weights = {name: value.contiguous() for name, value in convert_state_dict(original.weights).items()}
    network.load_state_dict(cast_weights(network, weights, to_dtype), assign=True)
    streaming = streaming_info(published, base_model=base_model, sigmas=sigmas)
    others = [path.name for path in base.iterdir() if path.name not in _PARTS]
    with pipeline_directory(output_dir, base, network, skipped=others) as partial:
        # diffusers' configuration mixin hides its attributes from type checkers.
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
        scheduler.save_pretrained(partial / "scheduler")
        write_index(partial, _INDEX)
        card = _CARD.format(name=output_dir.name, source=checkpoint.name, base_model=base_model)
        (partial / "README.md").write_text(card)
        if streaming is not None:
            write_info(partial, streaming)
    return output_dir


def streaming_info(
    published: Mapping[str, Any], *, base_model: str, sigmas: Sequence[float] | None
) -> StudentInfo | None:
    """How a causal network of a published config is streamed; None for one that sees whole clips."""
    window = published.get("local_attn_size", -1)
    if window == -1:
        if sigmas is not None:
            raise ValueError("--sigmas, but the config has no local_attn_size: the network is not causal")
        return None
    if window < _CHUNK_SIZE:
        raise ValueError(f"the config's local_attn_size={window} must be at least a chunk of {_CHUNK_SIZE} frames")
    action = published["action_config"]
    has_mouse = action.get("enable_mouse", True)
    steps = _STEPS if has_mouse else _STEPS_WITHOUT_MOUSE
    actions = {"keyboard_cond": [_CALL["num_frames"], action["keyboard_dim_in"]]}
    if has_mouse:
        actions = {"mouse_cond": [_CALL["num_frames"], action["mouse_dim_in"]], **actions}
    return StudentInfo(
        base_model=base_model,
        method="converted by fv-distill convert-matrixgame2",
        sigmas=few_step_sigmas(steps, flow_shift=FLOW_SHIFT, warp=True) if sigmas is None else tuple(sigmas),
        sample_type="sde",
        causal={
            "adapter": "fv_distill.models.matrixgame2_causal.CausalMatrixGame2Model",
            "chunk_size": _CHUNK_SIZE,
            "local_window": window - _CHUNK_SIZE,
            "sink_frames": published.get("sink_size", 0),
            "context_noise": 0.0,
        },
        call=dict(_CALL),
        needs_image=True,
        pipeline="fv_distill.models.pipelines.MatrixGame2Pipeline",
        reads_text=False,
        actions=actions,
    )


def _config_file(checkpoint: Path, config: str | Path | None) -> Path:
    if config is not None:
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such config")
        return path
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for name in _CONFIG_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {' or '.join(_CONFIG_FILES)}; give the published one with --config")


def _encoders_directory(base_model: str) -> Path:
    """The base model's directory; of a Hub repository only what is taken is downloaded.

    Raises:
        FileNotFoundError: if it lacks a part.
    """
    wanted = [f"{part}/*" for part in _PARTS]
    base = resolve_directory(base_model, name="base_model", patterns=("model_index.json", *wanted))
    missing = [part for part in _PARTS if not (base / part / "config.json").is_file()]
    if missing:
        raise FileNotFoundError(
            f"base_model={base_model!r} has no {' and no '.join(missing)}; give Wan 2.1 image-to-video, for instance "
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
        )
    return base


def _check_fits(weights: Mapping[str, Tensor], network: nn.Module, what: str) -> None:
    """Compare in the published names, which are those that the weights' owner can look up."""
    own = convert_state_dict_to_published(network.state_dict())
    prefix = next(iter(own)).split(".")[0] + "."
    try:
        check_weights_fit({name.removeprefix(prefix): value for name, value in own.items()}, weights)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
