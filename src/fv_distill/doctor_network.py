"""What the doctor says of the environment by which processes find each other, and models."""

import os
import socket
from collections.abc import Iterator

import torch

from .doctor_check import Check

_SHOWN = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TORCH_DISABLE_SHARE", "TORCH_ELASTIC_")


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
