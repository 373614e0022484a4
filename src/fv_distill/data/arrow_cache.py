"""Parquet files as memory-mapped Arrow, through HF `datasets`.

`datasets` converts the files once, into its cache, behind a lock: several ranks may start together. Bytes columns stay
bytes that can be viewed in place; lists of floats or `with_format("torch")` are 10 to 1000 times slower.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fv_distill.data.schema import DataError, ParquetSchemaError, read_metadata

# One Arrow batch while converting: bounds the memory that a large row group takes.
CONVERSION_BATCH_BYTES = 64 * 2**20
# Converting less than this takes a few seconds and shows no progress bar.
QUIET_BYTES = 2**30


def memory_mapped(
    files: Sequence[Path], types: Mapping[str, pa.DataType], *, cache_dir: str | os.PathLike[str] | None
) -> Any:
    """The rows of `files`, in order, as an HF `Dataset` whose rows are one-row Arrow tables.

    Args:
        files: parquet files that `check_schema` has seen.
        types: the columns wanted and the types they are read as.
        cache_dir: where the Arrow copy is kept; None for the default of `datasets`.

    Raises:
        ParquetSchemaError: if a file's content is damaged.
        DataError: if the cache can't be written.
    """
    # Slow to import (a second), so not before data are read.
    from datasets import Features, Split
    from datasets.exceptions import DatasetGenerationError
    from datasets.io.parquet import ParquetDatasetReader

    try:
        reader = ParquetDatasetReader(
            _data_files(files),
            split=Split.TRAIN,
            features=Features.from_arrow_schema(pa.schema(list(types.items()))),
            cache_dir=None if cache_dir is None else os.fspath(Path(cache_dir).expanduser()),
            columns=list(types),
            batch_size=_conversion_batch_size(files[0]),
        )
        with _progress_bar_if_long(files):
            return reader.read().with_format("arrow")
    except (DatasetGenerationError, pa.ArrowException) as error:
        damaged = [str(file) for file in files if not _is_readable(file)]
        if damaged:
            raise ParquetSchemaError(f"{damaged[0]} is damaged ({error.__cause__}); write or copy it again") from error
        raise DataError(
            f"{files[0].parent} could not be converted to Arrow in training.data.cache_dir: {error.__cause__ or error}"
        ) from error
    except OSError as error:
        raise DataError(
            f"training.data.cache_dir: the Arrow copy of {files[0].parent} could not be written ({error}); it needs as "
            "much room as the uncompressed data: set training.data.cache_dir to a directory that has it"
        ) from error


@contextlib.contextmanager
def _progress_bar_if_long(files: Sequence[Path]) -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = sum(file.stat().st_size for file in files) < QUIET_BYTES and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _data_files(files: Sequence[Path]) -> Any:
    """The files as `datasets` takes them, with what its cache is keyed by; given so, names are no glob patterns."""
    from datasets.data_files import DataFilesDict, DataFilesList

    versions = [(f"{status.st_mtime_ns}", f"{status.st_size}") for status in (file.stat() for file in files)]
    return DataFilesDict({"train": DataFilesList([str(file) for file in files], versions)})


def _conversion_batch_size(file: Path) -> int:
    metadata = read_metadata(file)
    groups = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    row_bytes = max(1, sum(groups) // max(1, metadata.num_rows))
    return max(1, min(1000, CONVERSION_BATCH_BYTES // row_bytes))


def _is_readable(file: Path) -> bool:
    try:
        with pq.ParquetFile(file) as opened:
            for _ in opened.iter_batches(batch_size=16):
                pass
    except (pa.ArrowException, OSError):
        return False
    return True
