"""Clips on disk: one safetensors file a batch, complete under its name, and a JSON of the settings that made them."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        frames: uint8 `[F, H, W, 3]`.
        latents: normalised, fp32 `[C, T, H, W]`; None where the pipeline doesn't show them.
        noise: a name for the noise that it started from; None for real clips.
    """

    frames: np.ndarray
    latents: Tensor | None
    noise: str | None


@dataclass(frozen=True)
class Cost:
    """What a batch took; None for real clips.

    Attributes:
        forward_passes: network calls per clip.
        seconds: from the first network call to the last frame, decoded.
        first_frames_seconds: the same to the first frames.
        peak_memory_bytes: see `PeakMemory`.
    """

    forward_passes: float
    seconds: float
    first_frames_seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Batch:
    """Clips that were made together."""

    clips: Sequence[Clip]
    cost: Cost | None


class ClipStore:
    """The clips of one way, in one directory.

    Args:
        directory: is made.
        settings: all that the clips depend on, as JSON has it.

    Raises:
        ValueError: if it holds clips that were made with other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        path = directory / SETTINGS_FILE
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            _check_same(json.loads(path.read_text()), settings, directory)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            _write_whole(path, json.dumps(settings, indent=2) + "\n")

    def has(self, first: int) -> bool:
        """Whether the batch that begins with clip `first` is there."""
        return self._path(first).is_file()

    def save(self, first: int, batch: Batch) -> None:
        """Keep a batch."""
        tensors = {"frames": torch.from_numpy(np.ascontiguousarray(np.stack([clip.frames for clip in batch.clips])))}
        latents = [clip.latents for clip in batch.clips if clip.latents is not None]
        if latents:
            tensors["latents"] = torch.stack(latents)
        cost = None if batch.cost is None else asdict(batch.cost)
        noise = [clip.noise for clip in batch.clips]
        path = self._path(first)
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata={"cost": json.dumps(cost), "noise": json.dumps(noise)})
        os.replace(partial, path)

    def load(self, first: int) -> Batch:
        """The batch that begins with clip `first`."""
        with safe_open(self._path(first), "pt") as file:
            metadata = file.metadata()
            frames = file.get_tensor("frames").numpy()
            latents = file.get_tensor("latents") if "latents" in file.keys() else [None] * len(frames)  # noqa: SIM118
        cost = json.loads(metadata["cost"])
        rows = zip(frames, latents, json.loads(metadata["noise"]), strict=True)
        return Batch([Clip(*row) for row in rows], None if cost is None else Cost(**cost))

    def batches(self) -> Iterator[Batch]:
        """All batches in order."""
        for path in sorted(self.directory.glob("*.safetensors")):
            yield self.load(int(path.stem))

    def __iter__(self) -> Iterator[Clip]:
        """All clips in order, one batch in memory at a time."""
        for batch in self.batches():
            yield from batch.clips

    def _path(self, first: int) -> Path:
        return self.directory / f"{first:06d}.safetensors"


def same_settings(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether the clips in a directory were made with these settings; a directory without clips has no others."""
    path = directory / SETTINGS_FILE
    return not path.is_file() or json.loads(path.read_text()) == json.loads(json.dumps(settings))


def _check_same(found: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    different = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if different:
        key = different[0]
        raise ValueError(
            f"{directory} holds clips that were made with other settings ({', '.join(different)}; {key} was "
            f"{_short(found.get(key))}, is {_short(wanted.get(key))}); give another --output, or --overwrite to make "
            "them anew"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
