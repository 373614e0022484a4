"""Between original Wan checkpoints and diffusers directories: the `fv-distill convert-wan` command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from fv_distill.console import console
from fv_distill.models.pretrained import check_weights_fit, parse_dtype, resolve_directory
from fv_distill.schedules.few_step import check_falling

from .diffusers_dir import (
    build_transformer,
    cast_weights,
    check_output,
    empty_transformer,
    pipeline_directory,
)
from .student_info import StudentInfo, write_info
from .wan_checkpoint import OriginalCheckpoint, read_original_checkpoint, read_safetensors_directory
from .wan_keys import convert_state_dict, convert_state_dict_to_original, to_original_key
from .weights_file import check_output_file, write_weights_file

_NETWORK_CLASS = "WanTransformer3DModel"

# What Wan 2.1's 480p networks, and the causal ones made of them, were trained on.
_CALL = {"height": 480, "width": 832, "num_frames": 81, "max_sequence_length": 512}

_CARD = """\
---
library_name: diffusers
{hub_base}tags: [diffusers, text-to-video, wan]
---

# {name}

The weights of `{source}`{entry}, renamed to diffusers' names by `fv-distill convert-wan` and written as `{component}`.
Everything else, the scheduler included, is that of `{base_model}`: sample as the weights' authors say.
"""


def convert_wan_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    base_model: str,
    key: str | None = None,
    component: str = "transformer",
    dtype: str | None = None,
    overwrite: bool = False,
    streaming: StudentInfo | None = None,
) -> Path:
    """Make a diffusers directory of weights in the original Wan's names: Wan's own, Self-Forcing's and their kin.

    Args:
        checkpoint: a `.pt`, `.pth` or `.safetensors` file, a safetensors index, or a directory of safetensors files.
        output_dir: the directory to write, whole or not at all.
        base_model: directory or Hub id of the same network in diffusers' format: its config is what the weights have
            to fit, and all that is no transformer is copied from it.
        key: the checkpoint's entry; see `read_original_checkpoint`. Which one was taken is printed.
        component: the pipeline's name of the network. Wan 2.2 A14B has `transformer` (high noise) and `transformer_2`
            (low noise): convert one, then the other with the first's output as `base_model`.
        dtype: "float32", "bfloat16" or "float16" for the written transformer; None keeps the weights' own.
        overwrite: replace an existing diffusers directory.
        streaming: how to stream a causal network, from `causal_info`; written to `fv_distill.json`.

    Raises:
        FileNotFoundError: if the checkpoint or the base model isn't there.
        FileExistsError: if the output directory isn't empty, and `overwrite` is off or it is no diffusers directory.
        ValueError: if the checkpoint can't be read, or listing the keys, in its own names, that are missing,
            unexpected or of another shape.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    to_dtype = None if dtype is None else parse_dtype(dtype)
    base = resolve_directory(base_model, name="base_model")
    _check_component(base, component)
    check_output(output_dir, base, overwrite=overwrite)
    if output_dir.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise ValueError(f"{checkpoint} lies in the output directory {output_dir}; convert to another directory")
    original = read_original_checkpoint(checkpoint, key=key)
    _tell_choice(checkpoint, original)
    _check_original_fits(original, empty_transformer(base, component=component), f"{checkpoint} and {base_model}")
    weights = {name: value.contiguous() for name, value in convert_state_dict(original.weights).items()}
    transformer = build_transformer(base, weights, dtype=to_dtype, component=component)
    with pipeline_directory(output_dir, base, transformer, component=component) as partial:
        card = _CARD.format(
            name=output_dir.name,
            source=checkpoint.name,
            entry=f" (its `{original.entry}`)" if original.entry else "",
            component=component,
            base_model=base_model,
            # The Hub links a card to its base model by id; a directory is no id.
            hub_base="" if Path(base_model).is_dir() else f"base_model: {base_model}\n",
        )
        (partial / "README.md").write_text(card)
        if streaming is not None:
            write_info(partial, streaming)
    return output_dir


def causal_info(
    base_model: str,
    *,
    chunk_size: int,
    sigmas: Sequence[float] | None = None,
    local_window: int | None = None,
    sink_frames: int = 0,
) -> StudentInfo:
    """How to stream the weights of a causal Wan, of which their file says nothing.

    Args:
        base_model: see `convert_wan_checkpoint`.
        chunk_size: latent frames per chunk; 3 in CausVid and Self-Forcing.
        sigmas: the few levels it was distilled to, falling from 1, without the final 0; None for a model of many steps.
        local_window: latent frames before a chunk that it sees; None means all.
        sink_frames: first latent frames that every chunk sees.

    Raises:
        ValueError: for sizes that make no chunks, or levels that don't fall from 1.
    """
    if chunk_size < 1 or sink_frames < 0 or (local_window is not None and local_window < 0):
        raise ValueError(
            f"chunk_size={chunk_size} must be at least 1 latent frame, and local_window={local_window} and "
            f"sink_frames={sink_frames} at least 0"
        )
    levels = None if sigmas is None else tuple(float(sigma) for sigma in sigmas)
    if levels is not None:
        check_falling(levels)
    causal = {"chunk_size": chunk_size, "local_window": local_window, "sink_frames": sink_frames, "context_noise": 0.0}
    return StudentInfo(
        base_model=base_model,
        method="converted by fv-distill convert-wan",
        sigmas=levels,
        sample_type="ode" if levels is None else "sde",
        causal={"adapter": "fv_distill.models.wan_causal.CausalWanModel", **causal},
        call=dict(_CALL),
    )


def convert_wan_to_original(
    model: str | Path,
    output_file: str | Path,
    *,
    component: str = "transformer",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a diffusers directory's Wan transformer as one safetensors file in the original's names.

    Args:
        model: a diffusers directory or Hub id.
        output_file: `*.safetensors`, written whole or not at all.
        component: the pipeline's name of the network; Wan 2.2 A14B also has `transformer_2`.
        dtype: as in `convert_wan_checkpoint`.
        overwrite: replace an existing file.

    Raises:
        FileNotFoundError: if there is no such model.
        FileExistsError: if the file exists and `overwrite` is off.
        ValueError: if the output is no `.safetensors` file or lies in the model's directory, or the model is no Wan or
            its weights don't fit its own config.
    """
    output_file = Path(output_file)
    to_dtype = None if dtype is None else parse_dtype(dtype)
    directory = resolve_directory(model, name="model")
    _check_component(directory, component)
    _check_output_file(output_file, directory, overwrite=overwrite)
    transformer = empty_transformer(directory, component=component)
    weights = read_safetensors_directory(directory / component)
    try:
        check_weights_fit(transformer.state_dict(), weights)
    except ValueError as error:
        raise ValueError(f"{directory / component}: {error}") from error
    return write_weights_file(output_file, convert_state_dict_to_original(cast_weights(transformer, weights, to_dtype)))


def _check_component(directory: Path, component: str) -> None:
    index = json.loads((directory / "model_index.json").read_text())
    networks = {name: kind[1] for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2}
    wan = [name for name, class_name in networks.items() if class_name == _NETWORK_CLASS]
    if component not in wan:
        has = f"its {_NETWORK_CLASS} is {' and '.join(wan)}" if wan else f"it has no {_NETWORK_CLASS}"
        raise ValueError(f"component {component!r} of {directory} can't be converted: {has}")


def _check_output_file(output_file: Path, directory: Path, *, overwrite: bool) -> None:
    check_output_file(output_file, overwrite=overwrite)
    if directory.resolve() in output_file.resolve().parents:
        raise ValueError(f"the output {output_file} lies in the model's directory {directory}; write it elsewhere")


def _tell_choice(checkpoint: Path, original: OriginalCheckpoint) -> None:
    if original.entry:
        beside = f"; it also has {', '.join(original.others)} (choose with --key)" if original.others else ""
        console.print(f"took {original.entry} of {checkpoint}{beside}", highlight=False, markup=False, soft_wrap=True)


def _check_original_fits(original: OriginalCheckpoint, transformer: nn.Module, what: str) -> None:
    """Compare in the checkpoint's own names, which are those that its owner can look up."""
    weights: Mapping[str, Tensor] = original.weights
    if all(to_original_key(name) is not None for name in weights):
        raise ValueError(f"{what}: the weights have diffusers' names already; there is nothing to convert")
    try:
        check_weights_fit(convert_state_dict_to_original(transformer.state_dict()), weights)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
