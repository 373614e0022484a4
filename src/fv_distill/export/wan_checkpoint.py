"""Reading Wan weights from files as they are handed around: pickled or safetensors, sharded, nested, wrapped."""

import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# What FSDP, activation checkpointing, torch.compile and DDP insert into names, at any depth.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
# Entries that hold a generating network, the preferred one first: averaged weights are the ones to sample with.
# `model` is as often an entry beside an optimizer's as a prefix; `diffusion_model` is ComfyUI's prefix.
_NETWORKS = ("generator_ema", "generator", "model", "diffusion_model")

_TORCH_SUFFIXES = {".pt", ".pth"}
_INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class OriginalCheckpoint:
    """One network's weights, under bare names.

    Attributes:
        weights: the tensors, on the CPU and where possible still on disk until they are used.
        entry: dotted name of the checkpoint's entry they were under; empty if it holds nothing else.
        others: the entries beside it.
    """

    weights: dict[str, Tensor]
    entry: str
    others: tuple[str, ...]


def read_original_checkpoint(path: str | Path, *, key: str | None = None) -> OriginalCheckpoint:
    """Read one network, freed from the prefixes that wrappers put before its names.

    Args:
        path: a `.pt`, `.pth` or `.safetensors` file, a safetensors index, or a directory of safetensors files.
        key: the entry to take, dotted where it is nested; None takes `generator_ema`, else `generator`, else `model`,
            else everything.

    Raises:
        FileNotFoundError: if there is no such file, or a shard is missing.
        ValueError: if the file is broken, holds more than tensors and plain values, or has no such entry.
    """
    tensors = _without_wrappers(_read_tensors(Path(path)), path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    if key is not None:
        # The names to choose from are those that a message shows, without wrappers.
        entry = _unwrapped(key)
        below = _below(tensors, entry) if entry else tensors
        if not below:
            raise ValueError(f"{path} has no entry {key!r}; it has {', '.join(_heads(tensors))}")
        return OriginalCheckpoint(_generator(below)[0], key, ())
    return OriginalCheckpoint(*_generator(tensors))


def _generator(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Go down the entries named in `_NETWORKS`; the second and third values tell what was chosen from."""
    chosen: list[str] = []
    others: list[str] = []
    while True:
        heads = _heads(tensors)
        name = next((name for name in _NETWORKS if name in heads), None)
        if name is None:
            return tensors, ".".join(chosen), tuple(others)
        if name.startswith("generator") or len(heads) > 1:
            chosen.append(name)
            others += [head for head in heads if head != name]
        tensors = _below(tensors, name)


def _below(tensors: Mapping[str, Tensor], entry: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{entry}."): value for key, value in tensors.items() if key.startswith(f"{entry}.")}


def _heads(tensors: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in tensors))


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _without_wrappers(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    bare: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = _unwrapped(key)
        if name in bare:
            raise ValueError(
                f"{path} holds {name} twice, with and without a wrapper's prefix; remove one of the copies"
            )
        bare[name] = value
    return bare


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or directory, those of nested mappings under dotted names."""
    if path.is_dir():
        return read_safetensors_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_shards(path.parent, _indexed_files(path))
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return dict(_flattened(_load_pickle(path)))
    raise ValueError(
        f"{path} is no {', '.join(sorted(_TORCH_SUFFIXES))} or .safetensors file, no {_INDEX_SUFFIX} and no directory "
        "of safetensors files"
    )


def read_safetensors_directory(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory's safetensors files: those that its index names if it has one, else all.

    Raises:
        FileNotFoundError: if there are none, or one of the index is missing.
        ValueError: if a file is broken, there are several indices, or two files hold the same key.
    """
    indices = sorted(directory.glob(f"*{_INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise ValueError(f"{directory} has several indices, give one: {', '.join(file.name for file in indices)}")
    if indices:
        return _read_shards(directory, _indexed_files(indices[0]))
    files = [file.name for file in sorted(directory.glob("*.safetensors"))]
    if not files:
        found = sorted(entry.name for entry in directory.iterdir() if entry.is_dir() or entry.suffix in _TORCH_SUFFIXES)
        hint = f"; give one of what is in it: {', '.join(found)}" if found else ""
        raise FileNotFoundError(f"{directory} has no safetensors files{hint}")
    return _read_shards(directory, files)


def _indexed_files(index: Path) -> list[str]:
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # An index is data from elsewhere: it names its neighbours, and nothing else on this machine.
        outside = [name for name in files if Path(name).name != name]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({type(error).__name__}: {error})") from error
    if outside:
        raise ValueError(f"{index} names files of other directories: {', '.join(outside)}")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    return files


def _read_shards(directory: Path, files: Collection[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in files:
        shard = _load_safetensors(directory / name)
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise ValueError(
                f"{directory}: {twice[0]} and {len(twice) - 1} more keys of {name} are in another file too; these are "
                "several models and not one: give a single file or an index"
            )
        tensors |= shard
    return tensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken or no safetensors file: {error}") from error


def _load_pickle(path: Path) -> Any:
    try:
        # Only the zip format can stay on disk until a tensor is used.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:
        # A pickle can fail with any error at all. torch's own message advises to switch the protection off.
        raise ValueError(
            f"{path} is broken, or holds other objects than tensors and plain values ({type(error).__name__}). Those "
            "are not loaded, since unpickling runs code that is in the file; get the weights as safetensors, or from a "
            "source that you trust save them anew as a plain dict of tensors"
        ) from error


def _flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested mappings; step counts, optimizers' lists and other plain values are left out."""
    if isinstance(value, Tensor):
        yield prefix, value.detach()
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flattened(below, f"{prefix}.{key}" if prefix else str(key))
