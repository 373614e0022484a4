"""From a training checkpoint to a diffusers directory: the `fv-distill export` command."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fv_distill.config.load import load_run_config
from fv_distill.config.schema import ExportFormat
from fv_distill.console import console
from fv_distill.lora import LoraSpec
from fv_distill.models.pipeline_index import own_pipeline
from fv_distill.models.pretrained import parse_dtype, resolve_directory

from .call_arguments import needs_image, pipeline_of, taken_actions, takes_prompt, training_call_arguments
from .checkpoint_weights import load_role_weights, read_checkpoint_metadata
from .diffusers_dir import build_transformer, export_diffusers_directory
from .lora_file import LoraWeights, export_lora_directory, loads_lora, merge_lora, write_comfyui_lora
from .original_names import to_original_names
from .run_record import RunFiles, find_run, training_record
from .student_info import StudentInfo
from .weights_file import check_output_file, write_weights_file


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    config: str | Path | None = None,
    role: str = "student",
    ema: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
    export_format: ExportFormat | None = None,
    run: RunFiles | None = None,
) -> Path:
    """Make one role of a training checkpoint useful elsewhere, on one process.

    Args:
        checkpoint: a complete checkpoint of a run of any world size.
        output_dir: the directory to write, or the `.safetensors` file for the formats `comfyui` and `original`.
        config: the run's YAML, where its model directories have moved since; None reads the checkpoint's own.
        role: which network.
        ema: the student's averaged weights, if the checkpoint has them.
        dtype: "float32", "bfloat16" or "float16" for the written transformer; None keeps the weights' own.
        overwrite: replace an existing output.
        export_format: "diffusers", a complete directory; "lora", an adapter for `pipe.load_lora_weights`; "comfyui",
            the same in the original Wan's names; "merged", a complete directory with the adapter in its weights;
            "original", the complete network in its family's published names. None is "lora" for an adapter of a network
            that stock pipelines sample, else a complete directory.
        run: where the run's losses and validation clips lie, for the card; None looks around the checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint is incomplete or the base model isn't there.
        FileExistsError: if the output directory isn't empty and `overwrite` is off.
        ValueError: if the checkpoint has no such role, its weights don't fit the base model, or it is no adapter and
            the format is one of an adapter.
    """
    metadata = read_checkpoint_metadata(checkpoint)
    if role == "ema" or role not in metadata["models"]:
        roles = [name for name in metadata["models"] if name != "ema"]
        raise ValueError(f"checkpoint {checkpoint} holds no role {role!r}; it has {', '.join(roles)}")
    averaged = ema and role == "student" and "ema" in metadata["models"]
    if ema and role == "student" and not averaged:
        console.print("the checkpoint has no averaged weights; exporting the latest ones", highlight=False)
    base_model, base_weights = _base_model(metadata, config, role)
    pipeline = metadata["config"]["pipeline"]
    few_step = metadata["few_step"] if role == "student" else None
    # Older checkpoints lack the entry, and are all of their pipeline's only network.
    network = metadata.get("networks", {}).get(role, {"component": "transformer", "pipeline_config": {}})
    pipeline_class = pipeline_of(resolve_directory(base_model), network["pipeline_config"])
    info = StudentInfo(
        base_model=base_model,
        method=metadata["config"]["method"]["_target_"],
        sigmas=None if few_step is None else tuple(few_step["sigmas"]),
        sample_type="ode" if few_step is None else few_step["sample_type"],
        causal=metadata.get("causal") if role == "student" else None,
        step=metadata["step"],
        averaged=averaged,
        call=training_call_arguments(
            resolve_directory(base_model),
            metadata["latent_shape"],
            text_length=metadata["config"]["training"]["data"]["text_length"],
        ),
        # Checkpoints of earlier versions don't tell; they are Wan's.
        guidance=metadata.get("sampling") if role == "student" else None,
        versions=metadata["versions"],
        hub_model_id=pipeline["hub_model_id"] if pipeline["push_to_hub"] else None,
        pipeline=own_pipeline(resolve_directory(base_model), network["pipeline_config"]),
        reads_text=takes_prompt(pipeline_class),
        # Checkpoints of earlier versions don't tell; their networks read no actions.
        actions=taken_actions(pipeline_class, metadata.get("conditions", {})),
        training=training_record(metadata),
        component=network["component"],
        pipeline_config=network["pipeline_config"],
        needs_image=pipeline_class is not None and needs_image(pipeline_class),
    )
    weights = load_role_weights(checkpoint, "ema" if averaged else role)
    spec = metadata["lora"].get(role)
    lora = None if spec is None else LoraWeights(weights, LoraSpec(**spec))
    if export_format is None:
        as_lora = lora is not None and info.causal is None and loads_lora(pipeline_class) and base_weights is None
        export_format = "lora" if as_lora else "diffusers"
    output, run = Path(output_dir), run or find_run(Path(checkpoint), metadata["config"])
    if export_format in ("lora", "comfyui") and lora is not None and base_weights is not None:
        raise ValueError(
            f"--format {export_format}, but the adapter was trained on models.<role>.weights={base_weights!r}, which "
            f"{base_model} hasn't got; use merged"
        )
    return _write(
        output, weights, lora, info, export_format, base_weights=base_weights, dtype=dtype, overwrite=overwrite, run=run
    )


def _write(
    output: Path,
    weights: Mapping[str, Tensor],
    lora: LoraWeights | None,
    info: StudentInfo,
    export_format: ExportFormat,
    *,
    base_weights: str | None,
    dtype: str | None,
    overwrite: bool,
    run: RunFiles | None,
) -> Path:
    to_dtype = None if dtype is None else parse_dtype(dtype)
    if export_format in ("lora", "comfyui", "merged") and lora is None:
        raise ValueError(f"--format {export_format}, but this role was trained whole and is no LoRA; use diffusers")
    if lora is not None and export_format in ("lora", "comfyui"):
        if to_dtype is not None:
            lora = replace(lora, weights={key: value.to(to_dtype) for key, value in lora.weights.items()})
        if export_format == "comfyui":
            return write_comfyui_lora(output, lora, overwrite=overwrite)
        return export_lora_directory(output, lora, info, overwrite=overwrite, run=run)
    if export_format == "original":
        check_output_file(output, overwrite=overwrite)
    if lora is not None:
        weights = merge_lora(info.base_model, lora, component=info.component, weights=base_weights)
    if export_format != "original":
        return export_diffusers_directory(output, weights, info, dtype=to_dtype, overwrite=overwrite, run=run)
    base = resolve_directory(info.base_model)
    transformer = build_transformer(base, weights, dtype=to_dtype, component=info.component)
    return write_weights_file(output, to_original_names(transformer))


def _base_model(metadata: dict[str, Any], config: str | Path | None, role: str) -> tuple[str, str | None]:
    """The directory or Hub id that the role was initialised from, checked to exist, and what replaced its weights."""
    models = metadata["config"]["models"]
    if config is not None:
        models = load_run_config(config, check_signatures=False).model_dump(mode="json")["models"]
        if role not in models:
            raise ValueError(f"models.{role} is missing from {config}; it has {', '.join(models)}")
    base_model = models[role]["init_from"]
    try:
        resolve_directory(base_model)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"models.{role}: {error}. Run from where the training was started, or give --config with the model's "
            "present place"
        ) from error
    # A role on another's network has no weights of its own.
    network = models[role].get("share_base_with") or role
    return base_model, models.get(network, {}).get("weights")
