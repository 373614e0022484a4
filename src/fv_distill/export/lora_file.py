"""A trained LoRA for others: diffusers' own form, ComfyUI's with the original Wan's names, or merged."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fv_distill.lora import LoraSpec
from fv_distill.models.pipeline_index import component_class, network_folder, pipeline_class
from fv_distill.models.pretrained import load_weights_override, resolve_directory

from .base_card import copy_licence, read_base_card
from .diffusers_dir import check_output, replaced_directory
from .model_card import write_model_card
from .run_record import RunFiles, copy_run_assets
from .scheduler import few_step_scheduler_for
from .student_info import StudentInfo, write_info
from .wan_keys import to_original_key
from .weights_file import check_output_file, write_weights_file

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoraWeights:
    """A trained adapter.

    Attributes:
        weights: by key without the adapter's name, `blocks.0.attn1.to_q.lora_A.weight`.
        spec: what it is.
    """

    weights: Mapping[str, Tensor]
    spec: LoraSpec


def export_lora_directory(
    output_dir: str | Path,
    lora: LoraWeights,
    info: StudentInfo,
    *,
    overwrite: bool = False,
    run: RunFiles | None = None,
) -> Path:
    """Write a directory that `pipe.load_lora_weights` takes, with PEFT's config in the file's metadata.

    Beside the weights lie a scheduler that visits a few-step student's levels, `fv_distill.json` and a model card. The
    directory is written beside its final name and renamed when complete.

    Args:
        output_dir: the directory to make.
        lora: the adapter.
        info: where it comes from and how it is sampled.
        overwrite: replace an earlier export.
        run: where the run's losses and validation clips lie, for the card.

    Raises:
        FileExistsError: if the directory isn't empty, and `overwrite` is off or it holds something else.
        ValueError: if diffusers' pipeline of this family knows no LoRA, or no stock scheduler visits the levels.
    """
    output_dir, base = Path(output_dir), resolve_directory(info.base_model)
    check_output(output_dir, base, overwrite=overwrite, ours=(DIFFUSERS_FILE,))
    pipeline_class = _pipeline_class(base, info.pipeline_config)
    with replaced_directory(output_dir) as partial:
        pipeline_class.save_lora_weights(
            partial,
            transformer_lora_layers=dict(lora.weights),
            transformer_lora_adapter_metadata=_peft_metadata(lora.spec),
        )
        if info.sigmas is not None and info.causal is None:
            scheduler: Any = few_step_scheduler_for(base, info.sigmas, sample_type=info.sample_type)
            scheduler.save_pretrained(partial / "scheduler")
        info = replace(info, lora_weights=DIFFUSERS_FILE, lora=asdict(lora.spec))
        write_info(partial, info)
        copy_licence(read_base_card(info.base_model, base), base, partial)
        if run is not None:
            copy_run_assets(run, partial, step=info.step)
        write_model_card(partial / "README.md", info, name=info.hub_model_id or output_dir.name, base=base)
    return output_dir


def write_comfyui_lora(output_file: str | Path, lora: LoraWeights, *, overwrite: bool = False) -> Path:
    """Write one file in the original Wan's names, `diffusion_model.blocks.0.self_attn.q.lora_down.weight`.

    ComfyUI loads it, and so does diffusers. The scale is multiplied into the second factor and no `alpha` is written,
    which means 1 to both; diffusers refuses an alpha of layers outside the blocks.

    Raises:
        FileExistsError: if the file exists and `overwrite` is off.
        ValueError: for another suffix than `.safetensors`, a DoRA, or a network that is no Wan.
    """
    output_file = Path(output_file)
    check_output_file(output_file, overwrite=overwrite)
    if lora.spec.dora:
        raise ValueError("a DoRA's magnitudes have no place in this format; export it with --format merged")
    return write_weights_file(output_file, _comfyui_weights(lora))


@torch.no_grad()
def merge_lora(
    base_model: str, lora: LoraWeights, *, component: str = "transformer", weights: str | None = None
) -> dict[str, Tensor]:
    """The base network's weights with the adapter in them, by PEFT's own merging, in the type that the base is kept in.

    Args:
        base_model: the directory or Hub id.
        lora: the adapter.
        component: the pipeline's name of the network.
        weights: what replaced the base's own weights, see `models.<role>.weights`.

    Raises:
        ValueError: if the adapter doesn't fit the network.
        FileNotFoundError: if `weights` isn't there.
    """
    base = resolve_directory(base_model)
    kind = component_class(base, component)
    stored = kind.from_pretrained(base, subfolder=network_folder(base, component), torch_dtype="auto")
    types = {name: value.dtype for name, value in stored.state_dict().items()}
    if weights is not None:
        load_weights_override(stored, weights)
    # Merged in float32: what an adapter adds is often smaller than half a unit of bf16.
    transformer: Any = stored.to(torch.float32)
    transformer.load_lora_adapter(dict(lora.weights), prefix=None, metadata=_peft_metadata(lora.spec))
    transformer.fuse_lora()
    transformer.unload_lora()
    return {name: value.to(types[name]) for name, value in transformer.state_dict().items()}


def _comfyui_weights(lora: LoraWeights) -> dict[str, Tensor]:
    converted = {}
    for key, value in lora.weights.items():
        module, factor = key.removesuffix(".weight").rsplit(".", 1)
        original = to_original_key(f"{module}.weight")
        if original is None:
            raise ValueError(f"{module} has no name in the original Wan; this format is for Wan networks only")
        name = f"diffusion_model.{original.removesuffix('.weight')}"
        if factor == "lora_A":
            converted[f"{name}.lora_down.weight"] = value.contiguous()
        else:
            converted[f"{name}.lora_up.weight"] = (value * lora.spec.scale).contiguous()
    return converted


def _peft_metadata(spec: LoraSpec) -> dict[str, Any]:
    """PEFT's config as plain values; `None` entries and enumerations are left to its defaults."""
    config = spec.peft_config().to_dict()
    kept = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern")
    return {**{key: config[key] for key in kept}, "target_modules": sorted(spec.target_modules)}


def loads_lora(pipeline_class: Any) -> bool:
    """Whether a diffusers pipeline, or None for one that diffusers lacks, has `load_lora_weights`."""
    return hasattr(pipeline_class, "save_lora_weights")


def _pipeline_class(base: Path, pipeline_config: Mapping[str, Any]) -> Any:
    kind = pipeline_class(base, pipeline_config)
    if not loads_lora(kind):
        raise ValueError(f"{kind.__name__} loads no LoRA; export with --format merged")
    return kind
