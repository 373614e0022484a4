"""What is found out before training: whether rows, roles and the launch fit each other, and the export can be made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from fv_distill.config.schema import RunConfig
from fv_distill.console import console
from fv_distill.data.parquet import ParquetDataset
from fv_distill.export.diffusers_dir import check_output
from fv_distill.export.scheduler import few_step_scheduler_for
from fv_distill.methods.base import TrainingMethod
from fv_distill.models.causal_base import CausalModelBase
from fv_distill.rollouts.ode import STATES


def check_quantized_is_whole(config: RunConfig) -> None:
    """Quantised weights can't be sharded; they are small enough to be whole."""
    for role, model in config.models.items():
        if model.quantization is None or model.placement == "replicated":
            continue
        fix = (
            "launch without FSDP"
            if model.lora.enable or any(other.share_base_with == role for other in config.models.values())
            else f"set models.{role}.placement: replicated"
        )
        raise ValueError(
            f"models.{role}.quantization={model.quantization}, but this launch shards networks, which quantised "
            f"weights don't take; {fix}"
        )


def check_run(dataset: ParquetDataset, method: TrainingMethod, config: RunConfig) -> None:
    """Find out before training what would otherwise fail during it or after it.

    Raises:
        ValueError: if the first row of a shape doesn't fit the student, or no stock scheduler can sample the export
            asked for.
        FileExistsError: if the export would replace something else than an export.
    """
    student = method.models["student"]
    if student.reads_text:
        student.check_prompts(method.prompts())
    elif config.training.data.caption_dropout:
        raise ValueError(
            f"training.data.caption_dropout={config.training.data.caption_dropout:g}, but {type(student).__name__} "
            "reads no text; leave the key out"
        )
    for rows in dataset.buckets:
        _check_row(dataset[int(rows[0])], method, config)
    if config.pipeline.export_dir is not None:
        check_output(Path(config.pipeline.export_dir), student.directory, overwrite=True)
    # A causal student streams without a scheduler.
    if method.few_step_sigmas is not None and not isinstance(student, CausalModelBase):
        _check_export(method, student.directory, wanted=config.pipeline.export_dir is not None)


def _check_row(row: Mapping[str, Any], method: TrainingMethod, config: RunConfig) -> None:
    student, num_frames = method.models["student"], None
    if "vae_latent" in row:
        latent_shape, num_frames = tuple(row["vae_latent"].shape), row.get("num_frames")
    elif STATES in row:
        latent_shape = tuple(row[STATES].shape[1:])
    elif config.training.data.latent_shape is not None:
        latent_shape = config.training.data.latent_shape
    else:
        raise ValueError(
            "the rows of training.data.data_path hold text only; set training.data.latent_shape to the [C, T, H, W] "
            "that the student shall generate"
        )
    student.check_latent_shape(latent_shape, num_frames=num_frames)
    if student.reads_text:
        student.check_text(tuple(row["text_embedding"].shape))
    shapes = {name: tuple(value.shape) for name, value in row.items() if isinstance(value, Tensor)}
    student.check_conditions(shapes, latent_shape)
    conditions = sorted(student.condition_shapes(latent_shape))
    for role, model in method.models.items():
        # The student prepares the batch for all of them.
        if (own := sorted(model.condition_shapes(latent_shape))) != conditions:
            raise ValueError(
                f"models.{role} is conditioned on {', '.join(own) or 'text alone'}, but the student on "
                f"{', '.join(conditions) or 'text alone'}; give both the same _target_"
            )
        if model.fixed_given_frames != student.fixed_given_frames:
            raise ValueError(
                f"models.{role} takes {model.fixed_given_frames} latent frames for given, but the student "
                f"{student.fixed_given_frames}; give all roles the same condition_frames, or networks of one kind"
            )


def _check_export(method: TrainingMethod, directory: Path, *, wanted: bool) -> None:
    """An export that is asked for has to be possible; one that may be asked for later is worth a warning now."""
    assert method.few_step_sigmas is not None, "the caller looked"
    try:
        few_step_scheduler_for(directory, method.few_step_sigmas, sample_type=method.sample_type)
    except ValueError as error:
        if wanted:
            raise
        if PartialState().is_main_process:
            console.print(f"this student can be trained but not exported: {error}", highlight=False, markup=False)
