"""What the doctor says of settings: accelerate's config, and the environment that processes find each other by."""

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from .doctor_check import Check

NAME = "accelerate config"
_FREE_CHOICE = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "FSDP")
_SHOWN = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TORCH_DISABLE_SHARE", "TORCH_ELASTIC_")


def accelerate_config_checks(path: Path | None) -> Iterator[Check]:
    """What this library refuses or can't do, in a config of `accelerate launch`, before anything is launched.

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
    except (OSError, ValueError, TypeError, KeyError) as error:
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


def communication_checks() -> Iterator[Check]:
    """NCCL's version, the variables that steer it and gloo, and whether what they name is there."""
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SHOWN)}
    backends = "gloo"
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        backends += f", nccl {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield Check("communication", "ok", ", ".join([backends, *(f"{name}={value}" for name, value in given.items())]))
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if variable in given and not _names_an_interface(given[variable], interfaces):
            detail = f"{variable}={given[variable]} names no interface of this machine"
            yield Check("network", "error", detail, f"one of {', '.join(interfaces)}; `ip address` tells which")
    if given.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        detail = "TORCH_NCCL_ASYNC_ERROR_HANDLING=0: a process that waits for a dead one waits for ever"
        yield Check("network", "warning", detail, "unset it")
    host = socket.getfqdn()
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        fix = "torchrun --local-addr ADDRESS, or an entry in /etc/hosts"
        yield Check("network", "warning", f"{host}, this machine's name, has no address ({error})", fix)


def _names_an_interface(value: str, interfaces: list[str]) -> bool:
    """As NCCL reads it, prefixes: `eth,ib`; `=eth0` is exact and `^lo` excludes."""
    if value.startswith("^"):
        return True
    exact, names = value.startswith("="), value.removeprefix("=").split(",")
    return any(name == wanted or (not exact and name.startswith(wanted)) for name in interfaces for wanted in names)


def hub_check() -> Check:
    """Whether models may be downloaded, and where they are kept."""
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(os.environ.get(name))]
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    if offline:
        return Check("hub", "ok", f"offline ({', '.join(offline)}): models have to be in {home} or directories")
    return Check("hub", "ok", f"models are downloaded to {home}; HF_HUB_OFFLINE=1 keeps many processes from asking")


def _is_set(value: str | None) -> bool:
    return value is not None and value.upper() in ("1", "ON", "YES", "TRUE")
