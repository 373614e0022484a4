"""Reading a training checkpoint's tensors on one process, whatever number of processes wrote them.

A checkpoint is a folder of safetensors files and two JSON files, without a pickle:

    metadata.json                       step, config, versions, optimizer options, ...; written last
    tensors.json                        where each tensor's chunks are
    student-00000.safetensors           a network's weights, under its own names; one such file per process
    student.optimizer-00000.safetensors its optimizer's state, `<parameter>/<key>`

A tensor is cut into chunks if its network was sharded; each process writes the chunks that it is the owner of.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CHECKPOINT_FORMAT = 2
METADATA_FILE = "metadata.json"
TENSORS_FILE = "tensors.json"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, which lies under the tensor's name in `file`."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor and the chunks that it is stored as."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_checkpoint_metadata(checkpoint: str | Path) -> dict[str, Any]:
    """The metadata that a complete checkpoint carries.

    Raises:
        FileNotFoundError: if the directory is missing or the checkpoint was never completed.
        ValueError: if this version can't read it.
    """
    path = Path(checkpoint) / METADATA_FILE
    if not path.is_file():
        reason = "it has no metadata.json, so it was never completed" if path.parent.is_dir() else "no such directory"
        raise FileNotFoundError(f"checkpoint {checkpoint}: {reason}; give a folder such as checkpoints/step-00000500")
    metadata = json.loads(path.read_text())
    if metadata.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{checkpoint} has format {metadata.get('format')}; this version of fv_distill reads {CHECKPOINT_FORMAT}. "
            "Resume or export it with the version that wrote it "
            f"(fv_distill {metadata.get('versions', {}).get('fv_distill', 'of then')})"
        )
    return metadata


def read_stored_tensors(checkpoint: str | Path) -> dict[str, dict[str, StoredTensor]]:
    """What `tensors.json` lists: groups (`student`, `student.optimizer`) of tensors by name."""
    listed = json.loads((Path(checkpoint) / TENSORS_FILE).read_text())
    files = listed["files"]
    return {
        group: {
            name: StoredTensor(
                dtype=getattr(torch, entry["dtype"]),
                shape=tuple(entry["shape"]),
                chunks=tuple(Chunk(files[file], tuple(offsets), tuple(sizes)) for file, offsets, sizes in entry["at"]),
            )
            for name, entry in tensors.items()
        }
        for group, tensors in listed["tensors"].items()
    }


def dump_stored_tensors(groups: Mapping[str, Mapping[str, StoredTensor]]) -> str:
    """The text of `tensors.json`; files are numbered, as a large run has a hundred thousand chunks."""
    files = sorted(
        {chunk.file for tensors in groups.values() for stored in tensors.values() for chunk in stored.chunks}
    )
    number = {file: index for index, file in enumerate(files)}
    tensors = {
        group: {
            name: {
                "dtype": str(stored.dtype).removeprefix("torch."),
                "shape": stored.shape,
                "at": [(number[chunk.file], chunk.offsets, chunk.sizes) for chunk in stored.chunks],
            }
            for name, stored in tensors.items()
        }
        for group, tensors in groups.items()
    }
    return json.dumps({"files": files, "tensors": tensors}, separators=(",", ":"))


class ChunkFiles:
    """The safetensors files of a checkpoint, opened when first read from; a context that closes them.

    Args:
        checkpoint: the folder.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self._folder = Path(checkpoint)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "ChunkFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._open = {}
        self._stack.close()

    def read(self, file: str, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        """A chunk, or the box of it that the slices cut out, on the CPU.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
            source = self._open[file]
            return source.get_tensor(name) if box is None else source.get_slice(name)[box]
        except Exception as error:
            # safetensors has an error class of its own for a damaged file, and FileNotFoundError for a missing one.
            raise ValueError(f"{self._folder / file}: can't read {name}: {error}; the checkpoint is damaged") from error


def load_checkpoint_tensors(checkpoint: str | Path, group: str) -> dict[str, Tensor]:
    """All tensors of a group, such as `student` or `student.optimizer`, whole and on the CPU.

    Raises:
        FileNotFoundError: if the checkpoint is incomplete.
        ValueError: if it holds no such group, or a file is missing or damaged.
    """
    read_checkpoint_metadata(checkpoint)
    groups = read_stored_tensors(checkpoint)
    if group not in groups:
        raise ValueError(f"checkpoint {checkpoint} holds no {group!r}; it has {', '.join(groups)}")
    with ChunkFiles(checkpoint) as files:
        return {name: _whole(name, stored, files) for name, stored in groups[group].items()}


def load_role_weights(checkpoint: str | Path, name: str) -> dict[str, Tensor]:
    """The weights of a role, or of `ema`, in the network's own key names, on the CPU.

    Raises:
        FileNotFoundError: if the checkpoint is incomplete.
        ValueError: if it holds no such network; those it holds are listed.
    """
    names = read_checkpoint_metadata(checkpoint)["models"]
    if name not in names:
        raise ValueError(f"checkpoint {checkpoint} holds no {name!r}; it has {', '.join(names)}")
    return load_checkpoint_tensors(checkpoint, name)


def _whole(name: str, stored: StoredTensor, files: ChunkFiles) -> Tensor:
    if _volume(chunk.sizes for chunk in stored.chunks) != _volume([stored.shape]):
        raise ValueError(f"the chunks of {name} don't make up its shape {stored.shape}; the checkpoint is damaged")
    if len(stored.chunks) == 1:
        return files.read(stored.chunks[0].file, name)
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    for chunk in stored.chunks:
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = files.read(chunk.file, name)
    return whole


def _volume(boxes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(sizes).numel() for sizes in boxes)
