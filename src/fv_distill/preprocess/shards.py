"""Rows in files that are complete under their names, so that what is done can be read from them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fv_distill.data.schema import read_metadata, write_rows

Row = dict[str, Any]


def shard_files(directory: Path) -> list[Path]:
    """The finished files."""
    return sorted(directory.glob("part-*.parquet"))


def finished_items(directory: Path) -> set[str]:
    """Keys of the items whose rows are in finished files; all rows of an item are in one file.

    Raises:
        ParquetSchemaError: for a file that is not readable.
    """
    done: set[str] = set()
    for path in shard_files(directory):
        read_metadata(path)
        done.update(pq.read_table(path, columns=["file_name"])["file_name"].to_pylist())
    return done


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process left half-written. Only before any process writes."""
    for pattern in ("part-*.parquet.*.tmp", "*.json.*.tmp"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def write_shards(directory: Path, rows: Iterable[Row], *, rank: int, shard_rows: int) -> None:
    """Write rows as they come, a new file every `shard_rows`, but never within the rows of one item.

    Args:
        directory: of the files, whose names have the rank in them: processes don't meet.
        rows: those of an item (a `file_name`) one after the other.
        rank: of this process; with fewer or more processes than before, numbers go on.
        shard_rows: after which a file ends.
    """
    pending = iter(rows)
    ahead = next(pending, None)
    number = _next_number(directory, rank)
    while ahead is not None:
        shard = _Shard(ahead, pending, shard_rows)
        write_rows(directory / f"part-{rank:05d}-{number:06d}.parquet", shard)
        ahead, number = shard.following, number + 1


class _Shard:
    """The rows of one file, taken from the stream of all; `following` is the first that is not its own."""

    def __init__(self, first: Row, pending: Iterator[Row], limit: int) -> None:
        self.following: Row | None = first
        self._pending, self._limit = pending, limit

    def __iter__(self) -> Iterator[Row]:
        count = 0
        while self.following is not None:
            row = self.following
            yield row
            count += 1
            self.following = next(self._pending, None)
            if count >= self._limit and self.following and self.following["file_name"] != row["file_name"]:
                return


def _next_number(directory: Path, rank: int) -> int:
    names = (re.fullmatch(rf"part-{rank:05d}-(\d+)\.parquet", path.name) for path in shard_files(directory))
    return 1 + max((int(name[1]) for name in names if name), default=-1)
