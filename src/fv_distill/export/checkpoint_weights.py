"""Reading one network's weights out of a training checkpoint, on one process, whatever wrote it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# How accelerate names things inside its checkpoints.
_SHARDED_PREFIX = "model."
_WRAPPER_PREFIX = "module."


CHECKPOINT_FORMAT = 1


def read_checkpoint_metadata(checkpoint: str | Path) -> dict[str, Any]:
    """The metadata that a complete checkpoint carries.

    Raises:
        FileNotFoundError: if the directory is missing or the checkpoint was never completed.
        ValueError: if this version can't read it.
    """
    path = Path(checkpoint) / "metadata.json"
    if not path.is_file():
        reason = "it has no metadata.json, so it was never completed" if path.parent.is_dir() else "no such directory"
        raise FileNotFoundError(f"checkpoint {checkpoint}: {reason}; give a folder such as checkpoints/step-00000500")
    metadata = json.loads(path.read_text())
    if metadata.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{checkpoint} has format {metadata.get('format')}; this version of fv_distill reads {CHECKPOINT_FORMAT}"
        )
    return metadata


def load_role_weights(checkpoint: str | Path, name: str) -> dict[str, Tensor]:
    """The weights of a role, or of `ema`, in the network's own key names, on the CPU.

    Raises:
        FileNotFoundError: if the checkpoint is incomplete.
        ValueError: if it holds no such network; those it holds are listed.
    """
    checkpoint = Path(checkpoint)
    metadata = read_checkpoint_metadata(checkpoint)
    names = metadata["models"]
    if name not in names:
        raise ValueError(f"checkpoint {checkpoint} holds no {name!r}; it has {', '.join(names)}")
    index = names.index(name)
    suffix = f"_{index}" if index else ""
    if not metadata["sharded"]:
        weights = load_file(checkpoint / f"model{suffix}.safetensors")
    elif (checkpoint / f"pytorch_model_fsdp_{index}").is_dir():
        weights = _load_sharded(checkpoint / f"pytorch_model_fsdp_{index}")
    else:
        # What accelerate writes under fsdp_state_dict_type: FULL_STATE_DICT.
        weights = torch.load(checkpoint / f"pytorch_model_fsdp{suffix}.bin", map_location="cpu", weights_only=True)
    return {key.removeprefix(_WRAPPER_PREFIX): value for key, value in weights.items()}


def _load_sharded(directory: Path) -> dict[str, Tensor]:
    """Put the shards of a torch distributed checkpoint together without a process group."""
    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    weights = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # That one process loads is what is meant here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(weights, storage_reader=FileSystemReader(directory), no_dist=True)
    return {key.removeprefix(_SHARDED_PREFIX): value for key, value in weights.items()}
