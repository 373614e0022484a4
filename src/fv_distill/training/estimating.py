"""From a config to an estimate: the run's own adapters, method and optimizers, built without weights."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator

from fv_distill.config.schema import RunConfig
from fv_distill.console import console
from fv_distill.data.parquet import ParquetDataset
from fv_distill.estimate.batch import meta_conditions
from fv_distill.estimate.estimate import Clip, Device, Estimate, make_estimate
from fv_distill.estimate.layout import Layout, read_layout
from fv_distill.estimate.parameters import trained_parameters
from fv_distill.estimate.published import config_directory
from fv_distill.estimate.report import as_json, print_estimate
from fv_distill.estimate.text_encoder import NO_TEXT_ENCODER, measure_text_encoder
from fv_distill.hardware import peak_flops
from fv_distill.methods.base import TrainingMethod
from fv_distill.methods.options import TrajectoryOptions
from fv_distill.models.base import ModelBase
from fv_distill.models.conditioning import TEXT_COLUMNS, Conditioning
from fv_distill.rollouts.ode import STATES

from .optim import build_optimizer
from .run import build_method, build_models, method_class

_DRY_RUN_MFU = 0.4


def run_estimate(config: RunConfig, args: argparse.Namespace) -> None:
    """`fv-distill estimate`: print the estimate of a config for the launch that the arguments describe.

    Raises:
        ValueError: for a number out of range, or an accelerate config that can't be read; see also `estimate_run`.
    """
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu={args.mfu:g} must be above 0 and at most 1, a share of the device's peak rate")
    layout = Layout() if args.accelerate_config is None else read_layout(args.accelerate_config, args.num_processes)
    if args.accelerate_config is None and args.num_processes not in (None, 1):
        raise ValueError("--num-processes needs --accelerate-config: how the processes share the networks is not known")
    precision = config.training.distributed.mixed_precision or layout.mixed_precision
    peak = 1e12 * args.peak_tflops if args.peak_tflops is not None else _peak_flops(args.device, precision)
    device = Device(args.device, peak, round(args.device_memory * 2**30), args.mfu)
    estimate = estimate_run(config, layout, device)
    if args.json:
        print(json.dumps(as_json(estimate), indent=2))
    else:
        print_estimate(estimate)


def print_dry_run_estimate(config: RunConfig, accelerator: Accelerator, latent_shape: Sequence[int]) -> None:
    """The estimate at the end of a dry run, for the launch that is in force and the device that is there."""
    layout = layout_of(accelerator)
    name, memory = layout.device_type.upper(), None
    if layout.device_type == "cuda":
        properties = torch.cuda.get_device_properties(accelerator.device)
        name, memory = properties.name, properties.total_memory
    device = Device(name, _peak_flops(name, layout.mixed_precision), memory, _DRY_RUN_MFU)
    own = config.model_copy(deep=True)
    own.training.data.latent_shape = cast(Any, tuple(latent_shape))
    try:
        estimate = estimate_run(own, layout, device)
    except (NotImplementedError, ValueError) as error:
        console.print(f"no estimate: {error}", highlight=False, markup=False)
        return
    print_estimate(estimate)


def _peak_flops(device_name: str, mixed_precision: str) -> float | None:
    return peak_flops(device_name, "bfloat16" if mixed_precision == "bf16" else "float32")


def estimate_run(config: RunConfig, layout: Layout, device: Device) -> Estimate:
    """Estimate what a config's run takes; no weights are read and nothing is downloaded.

    Args:
        config: of the run; where its data isn't there, `training.data.latent_shape` has to be set.
        layout: of the launch; the config's own mixed precision goes before the launch's.
        device: what each process runs on.

    Raises:
        FileNotFoundError: for a model whose shapes are not known.
        ValueError: for a clip whose shape is not known, or one that doesn't fit the networks.
        NotImplementedError: by a method that doesn't say what it calls.
    """
    if config.training.distributed.context_parallel_degree > 1:
        raise ValueError(
            "training.distributed.context_parallel_degree: processes that share a clip's tokens are not part of the "
            "estimate; set it to 1 to see what a process would need without"
        )
    own = config.training.distributed.mixed_precision
    layout = layout if own is None else replace(layout, mixed_precision=own)
    with _local_configs(config, layout.mixed_precision) as local:
        with torch.device("meta"):
            models = build_models(local)
        student = models["student"]
        for role, model in models.items():
            if not model.runs_on_meta:
                raise ValueError(
                    f"models.{role}: no estimate for a {type(model).__name__}, whose network looks at the values of "
                    "its inputs and can't be called with shapes alone"
                )
        encoder = measure_text_encoder(student.directory) if student.reads_text else NO_TEXT_ENCODER
        text = (config.training.data.text_length, student.text_width(encoder.width))
        shape = latent_shape(config)
        for model in models.values():
            _read_no_prompts(model, text, shape)
        student.check_latent_shape(shape)
        method, teacher = _split(config, models)
        data, loop = config.training.data, config.training.loop
        return make_estimate(
            method,
            _optimizers(method, config),
            layout=layout,
            clip=Clip(
                data.train_batch_size,
                loop.gradient_accumulation_steps,
                shape,
                text,
                _trajectories(config),
                student.condition_shapes(shape),
            ),
            device=device,
            has_average="ema" in config.callbacks,
            text_encoder_bytes=encoder.parameters * student.dtype.itemsize,
            num_steps=loop.max_train_steps,
            keep_last=config.training.checkpoint.keep_last,
            teacher=teacher,
            placements={role: model.placement for role, model in config.models.items()},
        )


def latent_shape(config: RunConfig) -> tuple[int, int, int, int]:
    """`[C, T, H, W]` of the config, or of the largest rows of its data.

    Raises:
        ValueError: if neither tells.
    """
    data = config.training.data
    if data.latent_shape is not None:
        return data.latent_shape
    try:
        dataset = ParquetDataset(data.data_path, required=(), on_bad_row=data.on_bad_row, cache_dir=data.cache_dir)
    except FileNotFoundError as error:
        raise ValueError(
            f"the clips' shape is not known: training.data.data_path={data.data_path!r} is not there to look at; set "
            "--training.data.latent_shape '[C, T, H, W]', such as '[16, 21, 60, 104]'"
        ) from error
    rows = [dataset[int(bucket[0])] for bucket in dataset.buckets]
    clips = [tuple(row["vae_latent"].shape) for row in rows if "vae_latent" in row]
    if found := clips or [tuple(row[STATES].shape[1:]) for row in rows if STATES in row]:
        return max(found, key=math.prod)
    raise ValueError("the rows of training.data.data_path hold text only; set training.data.latent_shape")


def layout_of(accelerator: Accelerator) -> Layout:
    """The layout that is in force."""
    kind: Any = "single" if accelerator.num_processes == 1 else "replicated"
    num_shards, reshard = 1, True
    if accelerator.is_fsdp2:
        plugin, mesh = accelerator.state.fsdp_plugin, accelerator.parallelism_config
        kind, reshard = "sharded", bool(plugin.reshard_after_forward)
        sizes = mesh.dp_shard_size if mesh is not None else 1
        num_shards = sizes if sizes > 1 else accelerator.num_processes
    return Layout(
        num_processes=accelerator.num_processes,
        kind=kind,
        num_shards=num_shards,
        mixed_precision=accelerator.mixed_precision,
        reshard_after_forward=reshard,
        device_type=accelerator.device.type,
    )


@contextmanager
def _local_configs(config: RunConfig, mixed_precision: Any) -> Iterator[RunConfig]:
    """The config with every model as a directory of config files."""
    local = config.model_copy(deep=True)
    local.training.distributed.mixed_precision = mixed_precision
    with ExitStack() as stack:
        for role, model in local.models.items():
            try:
                directory = stack.enter_context(config_directory(model.init_from))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"models.{role}: {error}") from error
            model.init_from = str(directory)
            # Backends need their packages, and differ in speed, not in size.
            model.attention_backend = None
        local.training.model.attention_backend = None
        yield local


def _split(config: RunConfig, models: dict[str, ModelBase]) -> tuple[TrainingMethod, ModelBase | None]:
    """The method, and the teacher of its paths where it has one."""
    cache_roles = method_class(config).cache_roles
    method = build_method(config, {role: model for role, model in models.items() if role not in cache_roles})
    return method, models.get("teacher") if "teacher" in cache_roles else None


def _trajectories(config: RunConfig) -> TrajectoryOptions | None:
    options = method_class(config).options_class.model_validate(config.method.options)
    return options if isinstance(options, TrajectoryOptions) else None


def _optimizers(method: TrainingMethod, config: RunConfig) -> dict[str, Any]:
    options = config.training.optimizer.as_kwargs()
    return {
        role: build_optimizer(trained_parameters(method.models[role]), {**options, **method.optimizer_overrides(role)})
        for role in method.roles
    }


def _read_no_prompts(model: ModelBase, text: tuple[int, int], latents: Sequence[int]) -> None:
    """Let an adapter take prompts for encoded without an encoder."""

    def encode(prompts: Sequence[str]) -> Conditioning:
        size = len(prompts)
        embeddings = torch.empty(size, *text, device="meta")
        shapes = {name: shape for name, shape in model.condition_shapes(latents).items() if name in TEXT_COLUMNS}
        extras = meta_conditions(shapes, size)
        return Conditioning(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device="meta"), extras)

    vars(model)["encode_prompts"] = encode
