"""Files of what a player does: mouse and keyboard at each frame of a video."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

ACTION_COLUMNS = {"mouse": "mouse_cond", "keyboard": "keyboard_cond"}
"""Name in a file -> data column."""

_MOUSE_WIDTH = 2


def read_action_file(path: Path) -> dict[str, np.ndarray]:
    """The actions of a .npz or .json file, by data column, fp32 `[F, 2]` and `[F, K]`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or what it holds has other shapes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    held = _read(path)
    if not (isinstance(held, dict) and any(name in held for name in ACTION_COLUMNS)):
        raise ValueError(f"{path} holds neither `mouse` nor `keyboard`")
    actions = {}
    for name, column in ACTION_COLUMNS.items():
        if name not in held:
            continue
        try:
            values = np.asarray(held[name], dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {name} holds something else than numbers ({error})") from error
        if values.ndim != 2 or (name == "mouse" and values.shape[1] != _MOUSE_WIDTH) or not np.isfinite(values).all():
            wanted = "[F, 2]" if name == "mouse" else "[F, K]"
            raise ValueError(f"{path}: {name} is {list(values.shape)}; needed are finite numbers {wanted}")
        actions[column] = values
    return actions


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} can't be read as a .npz or .json file: {error}") from error
