"""How a run's processes share its networks, as accelerate's config says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["single", "replicated", "sharded"]

_SHARDED = "FSDP"
_ONE_PROCESS = {"NO", "False", "None"}


Placement = Literal["auto", "replicated", "offloaded"]
"""Where a frozen role is; see `models.<role>.placement`."""


@dataclass(frozen=True)
class Layout:
    """Where the networks are.

    Attributes:
        num_processes: of the whole run, one accelerator each.
        kind: one process, replicas (DDP), or shards (FSDP2).
        num_shards: processes that share one copy of a sharded network; fewer than all with HSDP.
        mixed_precision: "no" or "bf16".
        reshard_after_forward: whether a sharded block is freed again after its forward pass.
        device_type: "cuda" or "cpu".
    """

    num_processes: int = 1
    kind: Kind = "single"
    num_shards: int = 1
    mixed_precision: str = "no"
    reshard_after_forward: bool = True
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        if self.num_processes % self.num_shards:
            raise ValueError(
                f"num_processes={self.num_processes} is no multiple of the {self.num_shards} processes that share a "
                "network (parallelism_config_dp_shard_size)"
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} is not supported; use bf16 or no")

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold shards of networks."""
        return self.kind == "sharded"

    def __str__(self) -> str:
        names = {"single": "one process", "replicated": "replicated (DDP)", "sharded": "sharded (FSDP2)"}
        shards = f", {self.num_shards} to a copy" if self.is_sharded and self.num_shards < self.num_processes else ""
        count = "" if self.kind == "single" else f"{self.num_processes} processes, "
        return f"{count}{names[self.kind]}{shards}, mixed precision {self.mixed_precision}"


def read_layout(path: str | Path, num_processes: int | None = None) -> Layout:
    """The layout that a config file of `accelerate launch` asks for.

    Args:
        path: the YAML that `accelerate config` writes.
        num_processes: instead of the file's, as `accelerate launch --num_processes` takes it. With HSDP the shards
            stay as large as they are.

    Raises:
        ValueError: for a file that is none, or one that the trainer would refuse.
    """
    config = _read(Path(path))
    count = int(config.get("num_processes") or 1) if num_processes is None else num_processes
    distributed = str(config.get("distributed_type", "NO"))
    common: dict[str, Any] = {
        "num_processes": count,
        "mixed_precision": _word(config.get("mixed_precision", "no")),
        "device_type": "cpu" if config.get("use_cpu") else "cuda",
    }
    if distributed != _SHARDED or count == 1:
        is_one = distributed in _ONE_PROCESS and count > 1
        if is_one:
            raise ValueError(
                f"{path}: num_processes={count} but distributed_type is NO; set MULTI_GPU for replicas, or FSDP"
            )
        return Layout(kind="single" if count == 1 else "replicated", **common)
    fsdp, mesh = config.get("fsdp_config") or {}, config.get("parallelism_config") or {}
    if int(fsdp.get("fsdp_version", 1)) != 2:
        raise ValueError(f"{path}: fsdp_config.fsdp_version={fsdp.get('fsdp_version', 1)}; only 2 is supported")
    return Layout(
        kind="sharded",
        num_shards=int(mesh.get("parallelism_config_dp_shard_size", count)),
        reshard_after_forward=bool(fsdp.get("fsdp_reshard_after_forward", True)),
        **common,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"the accelerate config {path} does not exist; configs/accelerate/ has examples")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "num_processes" not in config:
        raise ValueError(f"{path} is no config of `accelerate launch`: it has no num_processes")
    return config


def _word(value: Any) -> str:
    """YAML reads a bare `no` as false."""
    return "no" if value in (False, None) else str(value)
