"""Small files that survive a kill or a power failure, and the directories that they lie in."""

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a new file and put it on the disk for good."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Put a whole new file in the place of one that may exist; whoever looks sees either of them and never a part."""
    beside = path.with_name(f"{path.name}.new")
    write_durably(beside, text)
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put a file's contents, or a directory's list of names, on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
