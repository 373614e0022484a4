"""Where a role's network runs: on one device, replicated (DDP) or sharded (FSDP2, HSDP), as accelerate's config says.

Accelerate is built around one model. What it takes to give it several is kept in this file, each with its reason; how
its config is read, and made to act on a CPU, is in `launch_modes`.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fv_distill.config.schema import Placement
from fv_distill.console import console
from fv_distill.gloo import await_gloo_at_exit
from fv_distill.models.base import ModelBase

from .launch_modes import check_launch, cpu_offload_policy, enable_fsdp2_on_cpu, mesh_hidden_on_cpu, wants_fsdp


def make_accelerator(
    *,
    output_dir: str | Path,
    mixed_precision: str | None = None,
    timeout_minutes: float | None = None,
    trackers: Sequence[str] = (),
) -> Accelerator:
    """The accelerator that the launch configuration asks for.

    Args:
        output_dir: the run's directory; trackers write to its `logs` folder.
        mixed_precision: "no" or "bf16"; None takes the launcher's.
        timeout_minutes: how long a process waits for the others in a collective; None is torch's default.
        trackers: names of accelerate trackers.

    Raises:
        ValueError: for fp16, FSDP version 1, a launcher's FSDP that didn't come into force, or a mesh that doesn't fit.
    """
    check_launch()
    directories = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(Path(output_dir) / "logs"))
    with mesh_hidden_on_cpu():
        accelerator = Accelerator(
            # Without the flag accelerate starts no process group for several processes on a machine that has only CPUs.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            log_with=list(trackers) or None,
            project_config=directories,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[] if timeout_minutes is None else [_process_group_timeout(timeout_minutes)],
        )
    await_gloo_at_exit()
    if accelerator.mixed_precision not in ("no", "bf16"):
        # DMD gradients leave fp16's range.
        raise ValueError(f"mixed_precision {accelerator.mixed_precision} is not supported; use bf16 or no")
    _warn_of_a_shared_store(accelerator)
    enable_fsdp2_on_cpu(accelerator)
    if wants_fsdp() and accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        raise ValueError(f"the launcher asks for FSDP but accelerate made it {accelerator.distributed_type.value}")
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # Accelerate's policy reduces gradients in bf16. Its input cast would also round the fp32 timestep to 8 bits, so
        # `_cast_inputs_where_sharded` takes its place.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return accelerator


def _process_group_timeout(minutes: float) -> InitProcessGroupKwargs:
    # Accelerate hands on only what differs from its own default, ten minutes, which gloo's isn't: 10 would be lost.
    return InitProcessGroupKwargs(timeout=timedelta(minutes=minutes, microseconds=1))


def _warn_of_a_shared_store(accelerator: Accelerator) -> None:
    """Seen with torch 2.13 and gloo: processes that torchrun starts again hang, or fail to reach those that ended."""
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if may_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and accelerator.is_main_process:
        console.print(
            "warning: processes that are started again find the addresses of the ended ones in the launcher's store; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend c10d for --max-restarts",
            highlight=False,
        )


def prepare_trainable(accelerator: Accelerator, model: ModelBase, optimizer: Optimizer) -> Optimizer:
    """Put a trainable role's network and optimizer under the accelerator, replacing `model.transformer`.

    Called once per role: FSDP2 takes exactly one model with its optimizer.
    """
    model.compute_on(accelerator.device, _lower_dtype(accelerator))
    _wrap_blocks_by_network(accelerator, model.transformer)
    with _unused_parameters_found(accelerator) if model.has_unused_parameters else nullcontext():
        model.transformer, optimizer = accelerator.prepare(model.transformer, optimizer)
    _cast_inputs_where_sharded(accelerator, model)
    return optimizer


def prepare_adapted(accelerator: Accelerator, models: Sequence[ModelBase]) -> None:
    """Place a frozen network on which one or several roles train adapters; their optimizers are built afterwards.

    Several roles make DDP's wrapper useless: it waits for gradients of all adapters, and only one's are coming.
    `reduce_gradients` does its work. `accelerator.prepare` knows one optimizer per network.
    """
    network = models[0].transformer
    assert all(model.transformer is network for model in models), "roles of one network"
    _wrap_blocks_by_network(accelerator, network)
    if accelerator.is_fsdp2:
        network = fsdp2_prepare_model(accelerator, network)
    else:
        # "Evaluation": on its device and under autocast, without DDP.
        network = accelerator.prepare_model(network, evaluation_mode=True)
    for model in models:
        model.compute_on(accelerator.device, _lower_dtype(accelerator))
        model.transformer = network
    _cast_inputs_where_sharded(accelerator, models[0])


def _lower_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """What layers compute in by autocast or FSDP2's policy, None for the type of their weights."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else None


def prepare_frozen(accelerator: Accelerator, model: ModelBase, placement: Placement = "auto") -> None:
    """Place a network without an optimizer, which `accelerator.prepare` refuses under FSDP2.

    It is sharded where the launch shards, unless `placement` says otherwise.
    """
    if not accelerator.is_fsdp2 or placement == "replicated":
        prepare_alone(accelerator, model, placement)
        return
    model.compute_on(accelerator.device, _lower_dtype(accelerator))
    _wrap_blocks_by_network(accelerator, model.transformer)
    with _kept_in_host_memory(accelerator) if placement == "offloaded" else nullcontext():
        model.transformer = fsdp2_prepare_model(accelerator, model.transformer)
    _cast_inputs_where_sharded(accelerator, model)


def prepare_alone(accelerator: Accelerator, model: ModelBase, placement: Placement = "auto") -> None:
    """Place a frozen network so that a process can call it without the others: whole, or whole and offloaded."""
    device = accelerator.device
    model.compute_on(device)
    if placement != "offloaded":
        model.transformer.to(device)
        return
    network: Any = model.transformer
    # diffusers' own: one block at a time is on the device, with a stream the next one is on its way there meanwhile.
    network.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )


@contextmanager
def _unused_parameters_found(accelerator: Accelerator) -> Iterator[None]:
    """DDP doesn't wait for gradients that will never come, at the price of a walk through each graph."""
    handler = accelerator.ddp_handler
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        yield
    finally:
        accelerator.ddp_handler = handler


@contextmanager
def _kept_in_host_memory(accelerator: Accelerator) -> Iterator[None]:
    """The next network's shards stay in host memory; blocks are gathered on the device when they are called."""
    plugin = accelerator.state.fsdp_plugin
    policy, plugin.cpu_offload = plugin.cpu_offload, cpu_offload_policy(accelerator.device)
    try:
        yield
    finally:
        plugin.cpu_offload = policy


def _wrap_blocks_by_network(accelerator: Accelerator, network: nn.Module) -> None:
    """Let FSDP2 look for the blocks of the next network.

    The plugin settles on the block class of the first network that it sees: a causal student's would then be missing in
    the teacher. It also refuses names of blocks that a network has in other variants of it only.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is None:
        return
    if isinstance(plugin.auto_wrap_policy, functools.partial):
        plugin.auto_wrap_policy = plugin.auto_wrap_policy.func
    # Names that the launch config gives are the user's own.
    if not os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        present = {type(module).__name__ for module in network.modules()}
        # diffusers' networks state them; a network that doesn't is wrapped as a whole.
        names = cast(Any, network)._no_split_modules or ()
        plugin.transformer_cls_names_to_wrap = [name for name in names if name in present]


def _cast_inputs_where_sharded(accelerator: Accelerator, model: ModelBase) -> None:
    """Give an FSDP2 network its tensors in the type of its gathered weights, all but the timestep if it may differ."""
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy if accelerator.is_fsdp2 else None
    if policy is None or policy.param_dtype is None:
        return

    kept = () if model.embeds_time_in_own_dtype else ("timestep",)
    if model.mixes_types:
        network: Any = model.transformer
        network.forward = torch.autocast(accelerator.device.type, policy.param_dtype)(network.forward)

    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name, value in kwargs.items():
            if name not in kept and isinstance(value, torch.Tensor) and value.is_floating_point():
                kwargs[name] = value.to(policy.param_dtype)
        return args, kwargs

    model.transformer.register_forward_pre_hook(cast, with_kwargs=True)


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside a DDP wrapper; an FSDP2 network is its own wrapper."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def reshard(module: nn.Module) -> None:
    """Free gathered FSDP2 weights, so that `parameters()` are the shards that the optimizer updates.

    A forward without gradients leaves the root gathered: its parameters are then temporary copies.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local_parameters(model: ModelBase) -> dict[str, nn.Parameter]:
    """What a role trains, by name: its network's parameters or its adapter's, this process's shards under FSDP2."""
    reshard(model.transformer)
    named = unwrap(model.transformer).named_parameters()
    return {name: parameter for name, parameter in named if model.is_trained(name)}


def reduce_gradients(accelerator: Accelerator, model: ModelBase) -> None:
    """Average a role's gradients over replicas whose network no wrapper does it for: that of an adapter."""
    if model.adapter is None or accelerator.is_fsdp2 or accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in local_parameters(model).values() if parameter.grad is not None]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gradient_norm(model: ModelBase) -> torch.Tensor:
    """The total 2-norm of a prepared role's gradients, a scalar; the same on every process."""
    gradients = [parameter.grad for parameter in _parameters(model) if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: ModelBase, max_norm: float) -> torch.Tensor:
    """Scale a prepared role's gradients to a total 2-norm of at most `max_norm`; returns the norm before."""
    # Not accelerator.clip_grad_norm_: it looks a model up by comparing parameters and fails on the second of two
    # networks of equal shapes.
    norm = torch.nn.utils.clip_grad_norm_(_parameters(model), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _parameters(model: ModelBase) -> list[nn.Parameter]:
    """A role's parameters after a backward pass, which leaves them sharded."""
    named = unwrap(model.transformer).named_parameters()
    return [parameter for name, parameter in named if model.is_trained(name)]


def gradient_sync(accelerator: Accelerator, module: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Whether backward passes inside reduce gradients over processes: only the last micro-batch of a step has to.

    Where networks are sharded every one does: FSDP2 keeps unreduced gradients whole, 53 GiB for 14B parameters.
    """
    return nullcontext() if enabled or accelerator.is_fsdp2 else accelerator.no_sync(module)
