"""Text embeddings on the disk between the two passes: captions first, clips after, one encoder in memory at a time."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_HASH_BYTES = 16


def caption_hash(caption: str) -> str:
    """A name for a caption, the same everywhere."""
    return hashlib.blake2b(caption.encode(), digest_size=_HASH_BYTES).hexdigest()


class TextCache:
    """One safetensors file for each distinct caption, complete under its name.

    Args:
        directory: is made when the first file is written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def has(self, caption: str) -> bool:
        """Whether the caption has been encoded."""
        return self._path(caption).is_file()

    def save(self, caption: str, tensors: dict[str, Tensor]) -> None:
        """Keep what the encoder made of a caption: data column -> tensor."""
        path = self._path(caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        os.replace(partial, path)

    def load(self, caption: str) -> dict[str, Tensor]:
        """What `save` was given."""
        return load_file(self._path(caption))

    def remove(self) -> None:
        """Delete all, once the rows hold it."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, caption: str) -> Path:
        name = caption_hash(caption)
        return self._directory / name[:2] / f"{name}.safetensors"


def share_of(captions: Iterator[str], *, rank: int, num_ranks: int) -> list[str]:
    """The distinct captions that fall to a rank, by their hashes: no two ranks encode the same one."""
    mine: dict[str, None] = {}
    for caption in captions:
        if int(caption_hash(caption), 16) % num_ranks == rank:
            mine[caption] = None
    return list(mine)


def chunks(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The values in pieces of `size`."""
    for first in range(0, len(values), size):
        yield values[first : first + size]
