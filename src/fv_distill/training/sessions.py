"""`sessions.jsonl`: each start of a run with its step, machine and package versions.

Times and devices are no part of `metrics.jsonl`, which is the same for the same run wherever it runs.
"""

import platform
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .checkpoint import package_versions
from .durable_files import append_line

SESSIONS_FILE = "sessions.jsonl"


def write_session(accelerator: Accelerator, directory: Path, *, step: int) -> None:
    """Add a line; to be called on every process, since all of them are asked for their device."""
    devices = gather_object([_device_name(accelerator.device)])
    if accelerator.is_main_process:
        append_line(directory / SESSIONS_FILE, _session(accelerator, devices, step=step))


def _session(accelerator: Accelerator, devices: list[str], *, step: int) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "world_size": accelerator.num_processes,
        "sharded": accelerator.is_fsdp2,
        "mixed_precision": accelerator.mixed_precision,
        "devices": dict(Counter(devices)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})" if device.type == "cpu" else device.type
