"""What a player did during a clip: mouse and keyboard at each frame of the source."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fv_distill.models.pipeline_index import network_folder

from .decode import BadClipError

COLUMNS = {"mouse": "mouse_cond", "keyboard": "keyboard_cond"}
"""Name in the file -> data column."""

_MOUSE_WIDTH = 2


def needed_actions(directory: Path) -> tuple[str, ...]:
    """Which of mouse and keyboard a pipeline directory's network reads; both where its config doesn't tell."""
    config = directory / network_folder(directory) / "config.json"
    held = json.loads(config.read_text()) if config.is_file() else {}
    told = held.get("action_config") or {}
    return tuple(name for name in COLUMNS if told.get(f"enable_{name}", True))


def read_actions(
    path: Path | None, frame_numbers: np.ndarray, needed: Sequence[str] = tuple(COLUMNS)
) -> dict[str, Tensor]:
    """`mouse_cond` `[F, 2]` and `keyboard_cond` `[F, K]`, fp32, at the frames of a clip.

    Args:
        path: a .npz or .json with `mouse` and `keyboard`, one row for each frame of the source.
        frame_numbers: the clip's frames in the source, `[F]`.
        needed: which of the two; what else the file has is left out.

    Raises:
        BadClipError: if the file is not there, is damaged, or has too few rows or other shapes.
    """
    if path is None:
        raise BadClipError("bad actions", "there is no .npz or .json of its name")
    given = _read(path)
    actions = {}
    for name in needed:
        if name not in given:
            raise BadClipError("bad actions", f"{path.name} has no {name!r}")
        try:
            values = np.asarray(given[name], dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise BadClipError("bad actions", f"{path.name}: {name}: {error}") from error
        wanted = "[F, 2]" if name == "mouse" else "[F, K]"
        if values.ndim != 2 or (name == "mouse" and values.shape[1] != _MOUSE_WIDTH):
            raise BadClipError("bad actions", f"{path.name}: {name} has the shape {list(values.shape)}, not {wanted}")
        if not np.isfinite(values).all():
            raise BadClipError("bad actions", f"{path.name}: {name} has values that are not finite")
        if len(values) <= frame_numbers.max():
            raise BadClipError(
                "bad actions", f"{path.name}: {name} has {len(values)} rows, frame {frame_numbers.max()} is in the clip"
            )
        actions[COLUMNS[name]] = torch.from_numpy(values[frame_numbers])
    return actions


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".json":
            held = json.loads(path.read_text(encoding="utf-8"))
            return held if isinstance(held, dict) else {}
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BadClipError("bad actions", f"{path.name} can't be read: {error}") from error
