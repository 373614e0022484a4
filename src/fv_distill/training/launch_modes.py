"""Which parallel mode accelerate's launch configuration asks for, and what accelerate itself doesn't do on a CPU.

Every mode is a setting of accelerate's, in its config file or in the environment variables that its launcher makes of
it. On CPUs accelerate ignores FSDP and refuses a mesh; with the replacements here all modes can be tried there.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from torch.distributed.fsdp import CPUOffloadPolicy

_USE_MESH = "ACCELERATE_USE_PARALLELISM_CONFIG"


def wants_fsdp() -> bool:
    """Whether the launch asks for sharded networks."""
    return _is_on("ACCELERATE_USE_FSDP")


def check_launch() -> None:
    """Refuse what would fail later, or do something else than its name says.

    Raises:
        ValueError: naming the keys of accelerate's config and the fix.
    """
    if wants_fsdp() and _num_launched() > 1 and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            "the launcher asks for FSDP but version 2 is not in force; set fsdp_version: 2 in accelerate's config"
        )
    if wants_fsdp() and _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        # Accelerate looks each parameter's module up by name, and a diffusers network's root holds one itself.
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true fails on diffusers networks; set it to false in accelerate's config"
        )
    if _is_on(_USE_MESH):
        _check_mesh()


def _check_mesh() -> None:
    mesh = ParallelismConfig()
    sizes = {"tp": mesh.tp_size, "cp": mesh.cp_size, "sp": mesh.sp_size}
    for name, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"parallelism_config_{name}_size={size} in accelerate's config is not supported; remove it. A clip's "
                "tokens are shared between processes by training.distributed.context_parallel_degree"
            )
    shape = (
        f"parallelism_config_dp_replicate_size={mesh.dp_replicate_size}, "
        f"parallelism_config_dp_shard_size={mesh.dp_shard_size}"
    )
    processes = _num_launched()
    if mesh.total_size != processes:
        raise ValueError(
            f"{shape} make a mesh of {mesh.total_size} processes, but {processes} were launched; their product has to "
            "be num_processes"
        )
    if mesh.dp_shard_size > 1 and not wants_fsdp():
        raise ValueError(f"{shape}, but nothing is sharded: set distributed_type: FSDP in accelerate's config")


@contextmanager
def mesh_hidden_on_cpu() -> Iterator[None]:
    """Keep accelerate from looking at a mesh on CPU processes, where it refuses any; see `enable_fsdp2_on_cpu`."""
    wanted = os.environ.get(_USE_MESH)
    if wanted is None or (torch.accelerator.is_available() and not _is_on("ACCELERATE_USE_CPU")):
        yield
        return
    os.environ[_USE_MESH] = "false"
    try:
        yield
    finally:
        os.environ[_USE_MESH] = wanted


def enable_fsdp2_on_cpu(accelerator: Accelerator) -> None:
    """Switch FSDP2 on for CPU processes that ask for it; accelerate ignores the plugin there without a word.

    With a mesh (HSDP) the state gets what accelerate gives it on other devices, in the same order.
    """
    if not wants_fsdp() or accelerator.device.type != "cpu" or accelerator.num_processes == 1:
        return
    state = accelerator.state
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        state.fsdp_plugin.cpu_offload = cpu_offload_policy(accelerator.device)
    if _is_on(_USE_MESH):
        state.parallelism_config = ParallelismConfig()
        state.device_mesh = state.parallelism_config.get_device_mesh("cpu")
        state.parallelism_config._validate_accelerator(accelerator)


def cpu_offload_policy(device: torch.device) -> CPUOffloadPolicy:
    """FSDP2's offloading; memory can be pinned only where there is an accelerator to copy to."""
    return CPUOffloadPolicy(pin_memory=device.type != "cpu")


def describe_launch(
    accelerator: Accelerator, *, context_parallel_degree: int = 1, offloaded_roles: Sequence[str] = ()
) -> list[str]:
    """Lines on how the processes divide the work, for people to see at the start that it is what they meant."""
    count, device = accelerator.num_processes, accelerator.device.type
    notes = []
    if accelerator.is_fsdp2:
        mesh = accelerator.parallelism_config
        copies = mesh.dp_replicate_size if mesh is not None else 1
        mode = f"HSDP, {copies} copies of {count // copies} shards" if copies > 1 else f"FSDP2, {count} shards"
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            mode += ", kept in host memory"
            notes += ["fsdp_offload_params: true"]
    else:
        mode = "DDP, whole networks" if count > 1 else "whole networks"
    if context_parallel_degree > 1:
        mode += f"; {context_parallel_degree} processes share each clip"
    precision = {"no": "float32", "bf16": "bf16 with float32 master weights"}[accelerator.mixed_precision]
    notes += [f"models.{role}.placement: offloaded" for role in offloaded_roles]
    if device == "cpu":
        notes = [f"{note} saves nothing on a CPU: host memory is where networks are anyway" for note in notes]
    else:
        notes = []
    processes = "1 process" if count == 1 else f"{count} processes"
    return [f"{processes} on {device}: {mode}; {precision}", *notes]


def _num_launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
