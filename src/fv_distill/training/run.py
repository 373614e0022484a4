"""From a config to a finished run: the pieces that the example scripts put together by hand."""

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import diffusers
import huggingface_hub
import transformers
from accelerate import Accelerator

from fv_distill.callbacks.base import CallbackDict
from fv_distill.callbacks.hub import HUB_CALLBACK, HubCallback, check_hub
from fv_distill.config.instantiate import resolve_target
from fv_distill.config.load import dump_run_config, load_run_config
from fv_distill.config.local_modules import search_beside
from fv_distill.config.schema import RunConfig
from fv_distill.console import console
from fv_distill.data.parquet import ParquetDataset
from fv_distill.data.schema import REQUIRED_TENSORS
from fv_distill.export.checkpoint_weights import read_checkpoint_metadata
from fv_distill.export.convert import convert
from fv_distill.methods.base import TrainingMethod
from fv_distill.models.base import ModelBase

from .building import build_model, build_models, describe_role
from .checkpoint import AUTO, complete_checkpoints, find_checkpoint
from .context_parallel import ContextGroups
from .launch_modes import describe_launch
from .main_process import on_main_process
from .output_directory import check_output_directory
from .restart import refuse_another_run
from .run_checks import check_quantized_is_whole, check_run
from .sessions import SESSIONS_FILE
from .sharding import make_accelerator
from .sigma_losses import SIGMA_LOSSES_FILE
from .trackers import LOG_FOLDER, check_trackers
from .tracking import CONFIG_FILE, METRICS_FILE
from .trainer import Trainer
from .trajectories import TrajectoryCache, trajectory_options

# What a run writes into its output directory; --overwrite removes these and nothing else.
RUN_FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    SIGMA_LOSSES_FILE,
    SESSIONS_FILE,
    "checkpoints",
    LOG_FOLDER,
    "validation",
    "throughput.jsonl",
    "profile",
    "nan_guard",
)


def run_training_from_config(
    config_path: str | Path, dry_run: bool = False, overrides: Sequence[str] | Mapping[str, Any] | None = None
) -> Path:
    """Train what a YAML file describes, for any method, and return the output directory.

    Args:
        config_path: the run's YAML.
        dry_run: build everything, print the resolved config and the sizes, train nothing.
        overrides: dotted overrides, as `["--training.seed", "1"]` or `{"training.seed": 1}`.

    Raises:
        ValueError: for what is wrong with the config, the models or the data, naming key and fix.
    """
    return run_training(load_run_config(config_path, overrides), dry_run=dry_run)


def run_training(config: RunConfig, *, dry_run: bool = False) -> Path:
    """Train what a loaded config describes; see `run_training_from_config`."""
    trainer = build_trainer(config, dry_run=dry_run)
    if dry_run:
        print_dry_run(trainer)
    else:
        trainer.train()
        export_if_asked(trainer)
    trainer.accelerator.end_training()
    return Path(config.training.output_dir)


def run_make_trajectories(config: RunConfig, *, dry_run: bool = False) -> Path:
    """Make the teacher paths of `method.teacher_path_cache` without training, and return that directory.

    Raises:
        ValueError: as `build_trajectory_dataset` does, or if the config names no directory for them.
    """
    options = trajectory_options(config)
    if options is None or options.teacher_path_cache is None:
        raise ValueError("method.teacher_path_cache is null; set the directory that the paths go to")
    _quieten_libraries()
    distributed = config.training.distributed
    accelerator = make_accelerator(
        output_dir=config.training.output_dir,
        mixed_precision=distributed.mixed_precision,
        timeout_minutes=distributed.timeout_minutes,
    )
    build_trajectory_dataset(config, accelerator, dry_run=dry_run)
    accelerator.end_training()
    return Path(options.teacher_path_cache)


def build_trainer(config: RunConfig, *, dry_run: bool = False) -> Trainer:
    """The trainer of a config, in the order in which mistakes are cheapest to find."""
    accelerator = build_accelerator(config, dry_run=dry_run)
    dataset = build_trajectory_dataset(config, accelerator, dry_run=dry_run)
    models = build_models(config, [role for role in config.models if role not in method_class(config).cache_roles])
    method = build_method(config, models)
    check_run(dataset, method, config)
    return Trainer(accelerator, method, dataset, config, build_callbacks(config))


def build_accelerator(config: RunConfig, *, dry_run: bool = False) -> Accelerator:
    """The accelerator of the launch; the output directory is claimed first.

    Raises:
        FileExistsError: if the directory holds another run.
        ValueError: if it can't be written, or the Hub would refuse the export that is to be pushed.
    """
    training = config.training
    _quieten_libraries()
    check_trackers(training.tracker.trackers)
    accelerator = make_accelerator(
        output_dir=training.output_dir,
        mixed_precision=training.distributed.mixed_precision,
        timeout_minutes=training.distributed.timeout_minutes,
        trackers=() if dry_run else training.tracker.trackers,
    )
    # Made here for its checks: a launch that doesn't fit shall be told of before networks are loaded.
    groups = ContextGroups.of(accelerator, training.distributed.context_parallel_degree)
    if accelerator.is_fsdp2:
        check_quantized_is_whole(config)
    if accelerator.is_main_process:
        offloaded = [role for role, model in config.models.items() if model.placement == "offloaded"]
        for line in describe_launch(accelerator, context_parallel_degree=groups.degree, offloaded_roles=offloaded):
            console.print(line, highlight=False, markup=False)
    if not dry_run:
        # Every process looks before the main one writes, so that all of them see the same directory.
        _refuse_foreign_run(config)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and training.overwrite and not _continues_its_own_run(config):
            _remove_run(Path(training.output_dir))
        accelerator.wait_for_everyone()
        check_output_directory(accelerator, Path(training.output_dir))
        if config.pipeline.push_to_hub:
            check_hub(accelerator, config.pipeline)
    return accelerator


def build_dataset(config: RunConfig) -> ParquetDataset:
    """The rows of `training.data`; they have to hold text if a role's network reads any."""
    data = config.training.data
    search_beside(config.source_folder)
    kinds = [resolve_target(model.target) for model in config.models.values()]
    reads_text = any(kind.reads_text for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelBase))
    return ParquetDataset(
        data.data_path,
        required=REQUIRED_TENSORS if reads_text else (),
        on_bad_row=data.on_bad_row,
        cache_dir=data.cache_dir,
    )


def build_trajectory_dataset(config: RunConfig, accelerator: Accelerator, *, dry_run: bool = False) -> ParquetDataset:
    """The teacher's sampling paths as rows; those that `method.teacher_path_cache` lacks are made first.

    Once all are there the config needs no teacher any more. A dry run makes none, and takes the data's own rows. So
    does a method that has no such key, and one whose rows hold paths already, where it is null.

    Raises:
        ValueError: if the directory holds paths of something else, or some are missing and there is no teacher.
    """
    rows = build_dataset(config)
    if trajectory_options(config) is None:
        return rows
    cache = TrajectoryCache(config, rows)
    if cache.missing and dry_run:
        if accelerator.is_main_process:
            console.print(f"{cache.num_paths} teacher paths would be made in {cache.directory}", highlight=False)
        return rows
    if cache.missing:
        if "teacher" not in config.models:
            raise ValueError(
                f"method.teacher_path_cache: {cache.directory} lacks {len(cache.missing)} of {cache.num_files} files; "
                "set models.teacher to make them"
            )
        cache.make(accelerator, build_model(config, "teacher"))
    return cache.open()


def build_method(config: RunConfig, models: Mapping[str, ModelBase]) -> TrainingMethod:
    """The method of the config over its adapters."""
    kind = method_class(config)
    return kind(models, kind.options_class.model_validate(config.method.options))


def method_class(config: RunConfig) -> type[TrainingMethod]:
    """The class that `method._target_` names.

    Raises:
        TypeError: if it is no method.
    """
    search_beside(config.source_folder)
    kind = resolve_target(config.method.target)
    if not (isinstance(kind, type) and issubclass(kind, TrainingMethod)):
        raise TypeError(
            f"method._target_: {config.method.target} is not a subclass of fv_distill.methods.TrainingMethod"
        )
    return kind


def build_callbacks(config: RunConfig) -> CallbackDict:
    """The callbacks of the config, and behind them the one that pushes to the Hub, if asked for."""
    search_beside(config.source_folder)
    options = {name: callback.as_kwargs() for name, callback in config.callbacks.items()}
    callbacks = CallbackDict(options, config.training)
    if config.pipeline.push_to_hub:
        callbacks.add(HUB_CALLBACK, HubCallback(config.pipeline))
    return callbacks


def export_if_asked(trainer: Trainer) -> None:
    """Make a diffusers directory of the last checkpoint's student, and push it, as `pipeline` says.

    A run that was stopped early exports nothing, as it isn't done; where every checkpoint is pushed, its last one too.

    Raises:
        HubError: on the main process, if the Hub can't be used; the export is there then.
    """
    pipeline = trainer.config.pipeline
    if HUB_CALLBACK in trainer.callbacks:
        hub = trainer.callbacks[HUB_CALLBACK]
        assert isinstance(hub, HubCallback)
        hub.finish(trainer)
    elif pipeline.push_to_hub:
        # Callbacks that were put together by hand.
        HubCallback(pipeline).finish(trainer)
    elif pipeline.export_dir is not None and trainer.stopped_by is None:
        on_main_process(trainer.accelerator, lambda: _export(trainer), name="export")


def _export(trainer: Trainer) -> None:
    pipeline, checkpoint = trainer.config.pipeline, trainer.checkpoints.latest()
    assert checkpoint is not None, "training ends with a checkpoint"
    assert pipeline.export_dir is not None, "the caller looked"
    convert(checkpoint, pipeline.export_dir, ema=pipeline.ema, overwrite=True, export_format=pipeline.export_format)
    console.print(f"exported the student to {pipeline.export_dir}", highlight=False, markup=False)


def print_dry_run(trainer: Trainer) -> None:
    """Print the resolved config, the sizes of the networks, what the run will take, and the batch."""
    if not trainer.accelerator.is_main_process:
        return
    console.print(dump_run_config(trainer.config), markup=False, highlight=False)
    for role in trainer.models:
        console.print(describe_role(trainer.config, role, trainer.models[role]), highlight=False)
    plan = trainer.plan
    # Assembled from what is in this file.
    from .estimating import print_dry_run_estimate

    # The largest clips are what has to fit.
    largest = max(trainer.latent_shapes, key=math.prod)
    print_dry_run_estimate(trainer.config, trainer.accelerator, largest)
    console.print(
        f"{len(trainer.dataset)} rows, global batch {plan.global_batch_size}, "
        f"{trainer.config.training.loop.max_train_steps} steps; dry run: nothing was trained",
        highlight=False,
    )


def _quieten_libraries() -> None:
    """One progress bar is enough: ours."""
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Said at every forward of every network; the adapters never write into an output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _refuse_foreign_run(config: RunConfig) -> None:
    training = config.training
    directory = Path(training.output_dir)
    if training.checkpoint.resume_from_checkpoint == AUTO:
        refuse_another_run(config, RUN_FILES)
        return
    if training.checkpoint.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(training.checkpoint.resume_from_checkpoint, directory)
        read_checkpoint_metadata(checkpoint)
        if _continues_its_own_run(config):
            _refuse_later_checkpoints(checkpoint, directory)
            return
    present = [name for name in RUN_FILES if (directory / name).exists()]
    if present and not training.overwrite:
        raise FileExistsError(
            f"training.output_dir={str(directory)!r} holds another run ({', '.join(present)}); resume it with "
            "--resume-from-checkpoint latest, replace it with --overwrite, or choose another directory"
        )


def _continues_its_own_run(config: RunConfig) -> bool:
    """Whether the checkpoint to resume from, if any, is one of the output directory's."""
    resume_from, directory = config.training.checkpoint.resume_from_checkpoint, Path(config.training.output_dir)
    if resume_from is None:
        return False
    return find_checkpoint(resume_from, directory).resolve().parent == (directory / "checkpoints").resolve()


def _refuse_later_checkpoints(checkpoint: Path, directory: Path) -> None:
    """Those of the abandoned future would be taken for the newest, exported, and kept by the rotation."""
    found = complete_checkpoints(directory)
    later = [path.name for path in found if _step_of(path) > _step_of(checkpoint)]
    if later:
        raise FileExistsError(
            f"resume_from_checkpoint: {checkpoint}, but its run went on to {', '.join(later)}; resume from latest, "
            "remove the later ones, or choose another training.output_dir"
        )


def _step_of(checkpoint: Path) -> int:
    return int(read_checkpoint_metadata(checkpoint)["step"])


def _remove_run(directory: Path) -> None:
    for name in RUN_FILES:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
