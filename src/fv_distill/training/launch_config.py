"""What this library refuses or can't do, in a config of `accelerate launch`, before anything is launched."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from fv_distill.doctor_check import Check

NAME = "accelerate config"
_FREE_CHOICE = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "FSDP")


def accelerate_config_checks(path: Path | None) -> Iterator[Check]:
    """A finding for each problem of the config, or one that sums it up.

    Args:
        path: the file; None takes the one that `accelerate config` writes, if it is there.
    """
    if path is None:
        path = Path(default_config_file)
        if not path.is_file():
            yield Check(NAME, "ok", f"none at {path}: give `accelerate launch` one by --config_file")
            return
    try:
        config = load_config_from_file(str(path)).to_dict()
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        yield Check(NAME, "error", f"{path} can't be read: {error}", "take one of configs/accelerate as a pattern")
        return
    problems = [*_precision_problems(config), *_fsdp_problems(config), *_size_problems(config)]
    for status, detail, fix in problems:
        yield Check(NAME, status, f"{path}: {detail}", fix)
    if not problems:
        kind = "FSDP2" if config.get("distributed_type") == "FSDP" else config.get("distributed_type")
        machines = f" on {config['num_machines']} machines" if config.get("num_machines", 1) > 1 else ""
        detail = f"{path}: {kind}, {config['num_processes']} processes{machines}, {config['mixed_precision']}"
        yield Check(NAME, "ok", detail)


def _precision_problems(config: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    precision = config.get("mixed_precision") or "no"
    if precision not in ("no", "bf16"):
        yield "error", f"mixed_precision: {precision} is refused", "set mixed_precision: bf16, or no"


def _fsdp_problems(config: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    kind = str(config.get("distributed_type"))
    if kind not in _FREE_CHOICE:
        yield "error", f"distributed_type: {kind} is not supported", "shard with distributed_type: FSDP, version 2"
    if kind != "FSDP":
        return
    fsdp = config.get("fsdp_config") or {}
    if fsdp.get("fsdp_version", 1) != 2:
        yield "error", f"fsdp_version: {fsdp.get('fsdp_version', 'missing, which is 1,')} is refused", "fsdp_version: 2"
    # The launcher's own default is true.
    if _is_on(fsdp.get("fsdp_cpu_ram_efficient_loading", True)):
        yield (
            "error",
            "fsdp_cpu_ram_efficient_loading is on (its default), which fails on diffusers' networks",
            "set fsdp_cpu_ram_efficient_loading: false",
        )
    if _is_on(fsdp.get("fsdp_activation_checkpointing", False)):
        yield (
            "error",
            "fsdp_activation_checkpointing gave wrong gradients",
            "set it to false, and training.model.gradient_checkpointing: true in the run's config",
        )
    policy = fsdp.get("fsdp_auto_wrap_policy")
    if policy != "TRANSFORMER_BASED_WRAP":
        yield (
            "warning",
            f"fsdp_auto_wrap_policy: {policy or 'missing'}: networks are not sharded block by block",
            "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        )


def _is_on(value: Any) -> bool:
    return str(value).lower() == "true"


def _size_problems(config: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    processes, machines = config.get("num_processes") or 1, config.get("num_machines") or 1
    if processes % machines:
        fix = "num_processes counts those of all machines"
        yield "error", f"num_processes: {processes} do not divide by num_machines: {machines}", fix
    devices = torch.accelerator.device_count()
    if 0 < devices < processes // machines:
        fix = f"set num_processes: {devices * machines}"
        yield "error", f"{processes // machines} processes a machine, and this one has {devices} accelerators", fix
    mesh = config.get("parallelism_config") or {}
    size = 1
    for key, value in mesh.items():
        size *= int(value) if key.endswith("_size") else 1
    if mesh and size != processes:
        fix = "their product has to be num_processes"
        yield "error", f"parallelism_config's sizes multiply to {size}, num_processes is {processes}", fix
