"""How a checkpoint's tensors reach the disk and come back: torch's distributed checkpoint over safetensors files.

torch plans which process writes which chunk (replicas are written once, shared out over the processes that have them)
and which chunks overlap what a process wants to read. Its own storage layers don't do here: the usual one pickles its
index and whatever is no tensor; the one for safetensors keeps no index, so that a missing file goes unnoticed, and
makes a copy of all that a process writes in memory.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fv_distill.export.checkpoint_weights import Chunk, ChunkFiles, StoredTensor, dump_stored_tensors

INCOMPLETE = ".incomplete"
"""Ends the name of a checkpoint's folder until it is complete."""

# A tensor's key in torch's state dict is `<group>/<name>`.
_SEPARATOR = "/"
# https://huggingface.co/docs/safetensors: the names of types in a header.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Headers, JSON files and the file system's own bookkeeping, beside the tensors' bytes.
_SPARE_BYTES = 16 * 2**20


class NoSpaceError(OSError):
    """A checkpoint would not fit."""


class ChunkWriter(StorageWriter):
    """Plans with the other processes what each writes; the writing itself is left to `write`, now or on a thread.

    Args:
        folder: which `write` fills; made when the plan is.
        copy: take copies of the tensors into host memory, so that training may change them while `write` runs.

    Attributes:
        total_bytes: of all processes; known on the coordinator once planned.
        index: the text of `tensors.json`; likewise.
    """

    def __init__(self, folder: Path, *, copy: bool) -> None:
        self.folder = folder
        self.total_bytes = 0
        self.index = ""
        self._copy = copy
        self._files: dict[str, dict[str, Tensor]] = {}

    def plan(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Agree on who writes what; a collective call.

        Raises:
            dcp.CheckpointException: on every process, if it failed on any.
        """
        state = {
            f"{group}{_SEPARATOR}{name}": value for group, values in groups.items() for name, value in values.items()
        }
        with _one_process_is_fine():
            dcp.save(
                state,
                storage_writer=self,
                planner=DefaultSavePlanner(flatten_state_dict=False),
                no_dist=not torch.distributed.is_initialized(),
            )

    def write(self) -> None:
        """Write this process's files and put them on the disk for good.

        Raises:
            OSError: if it can't be done.
        """
        for name, tensors in self._files.items():
            write_safetensors(self.folder / name, tensors)
        self._files = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the processes, and make the folder if there is room; on the coordinator."""
        self.total_bytes = sum(_num_bytes(plan) for plan in plans)
        # They may be the room that is needed.
        remove_leftovers(self.folder.parent)
        check_space(self.folder.parent, self.total_bytes)
        self.folder.mkdir(parents=True)
        return [dataclasses.replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Gather this process's chunks by file."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} isn't there; training.output_dir has to be shared by all machines")
        check_space(self.folder, _num_bytes(plan))
        files: dict[str, dict[str, Tensor]] = defaultdict(dict)
        results = []
        for item in plan.items:
            group, _, name = item.index.fqn.partition(_SEPARATOR)
            file = f"{group}-{plan.storage_data:05d}.safetensors"
            assert item.tensor_data is not None and name not in files[file], "torch plans one chunk of each tensor"
            size = item.tensor_storage_size() or 0
            if size:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                files[file][name] = tensor.detach().to("cpu", copy=True) if self._copy else tensor.detach()
                results.append(WriteResult(index=item.index, size_in_bytes=size, storage_data=file))
        self._files = dict(files)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the index; on the coordinator."""
        place = {result.index: result.storage_data for written in results for result in written}
        groups: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for key, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), "only tensors are given"
            group, _, name = key.partition(_SEPARATOR)
            chunks = (
                Chunk(file, tuple(chunk.offsets), tuple(chunk.sizes))
                for chunk in entry.chunks
                # A process may have nothing of a tensor with fewer rows than there are processes.
                if (file := place.get(MetadataIndex(key, chunk.offsets))) is not None and chunk.sizes.numel()
            )
            groups[group][name] = StoredTensor(entry.properties.dtype, tuple(entry.size), tuple(chunks))
        self.index = dump_stored_tensors(groups)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any path."""
        return True


class ChunkReader(StorageReader):
    """Reads what each process needs of a checkpoint, in place.

    Args:
        folder: the checkpoint.
        stored: its `read_stored_tensors`.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Mapping[str, StoredTensor]]) -> None:
        self.folder = folder
        self._stored = {
            f"{group}{_SEPARATOR}{name}": entry for group, entries in stored.items() for name, entry in entries.items()
        }

    def load_into(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill the tensors, whole or sharded in any way, from the checkpoint; a collective call.

        Raises:
            dcp.CheckpointException: on every process, if it failed on any.
        """
        state = {
            f"{group}{_SEPARATOR}{name}": value for group, values in groups.items() for name, value in values.items()
        }
        with _one_process_is_fine():
            dcp.load(
                state,
                storage_reader=self,
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=not torch.distributed.is_initialized(),
            )

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in torch's terms."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    properties=TensorProperties(dtype=entry.dtype),
                    size=torch.Size(entry.shape),
                    chunks=[
                        ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
                        for chunk in entry.chunks
                    ],
                )
                for key, entry in self._stored.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every overlap of a stored chunk with what this process holds."""
        with ChunkFiles(self.folder) as files:
            for item in plan.items:
                target = planner.resolve_tensor(item).detach()
                target.copy_(self._read(item, files))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, files: ChunkFiles) -> Tensor:
        index = item.storage_index
        chunk = next(
            c for c in self._stored[index.fqn].chunks if index.offset is None or c.offsets == tuple(index.offset)
        )
        name = index.fqn.partition(_SEPARATOR)[2]
        if tuple(item.lengths) == chunk.sizes:
            return files.read(chunk.file, name)
        box = tuple(slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True))
        return files.read(chunk.file, name, box)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any path."""
        return True


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file and put it on the disk for good.

    The library's own `save_file` wants everything in host memory at once, where tensors on a device are moved one by
    one here, and hides the system's error number.

    Raises:
        OSError: if the disk is full or can't be written.
        ValueError: for a type that the format doesn't have.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} can't be stored; safetensors has {', '.join(map(str, _DTYPES))}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals that were killed have left behind; it is never resumed from."""
    for left in folder.glob(f"step-*{INCOMPLETE}"):
        shutil.rmtree(left)


def check_space(folder: Path, num_bytes: int) -> None:
    """Find out before writing whether so much fits into the nearest directory that is there.

    Raises:
        NoSpaceError: if it doesn't; the message has both numbers.
    """
    while not folder.is_dir():
        folder = folder.parent
    needed, free = num_bytes + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpaceError(f"it takes {format_bytes(needed)} and {format_bytes(free)} are free in {folder}")


def format_bytes(num_bytes: int) -> str:
    """In GB, or in MB where that would be a small fraction."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without torch's warning that a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _num_bytes(plan: SavePlan) -> int:
    return sum(item.tensor_storage_size() or 0 for item in plan.items)
