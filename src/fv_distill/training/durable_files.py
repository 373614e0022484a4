"""Small files that survive a kill or a power failure, and the directories that they lie in."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line of JSON in one write: a kill leaves it whole or, at worst, cut off, and never two lines mixed."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())
