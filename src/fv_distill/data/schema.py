"""The parquet schema of preprocessed video data: its columns, its writer and the check before training.

A tensor is three columns: `<name>_bytes` (C-contiguous, little-endian), `<name>_shape` and `<name>_dtype`. This is the
published schema of FastVideo's preprocessing, so data sets made by it are read unchanged. `vae_latent` holds raw VAE
latents `[C, T, H, W]`, `text_embedding` the unpadded `[L, D]`; `first_frame_latent` is normalised, as it is there.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

REQUIRED_TENSORS = ("text_embedding",)
TENSORS = (
    "text_embedding",
    "pooled_text_embedding",
    "text_embedding_2",
    "text_mask_2",
    "vae_latent",
    "clip_feature",
    "first_frame_latent",
    "mouse_cond",
    "keyboard_cond",
    "trajectory_latents",
    "trajectory_timesteps",
    "pil_image",
)
TENSOR_NDIM = {"text_embedding": 2, "vae_latent": 4}
"""Dimensions that every family's tensor must have; the others differ between families."""

REQUIRED_SCALARS = ("caption",)
SCALARS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "file_name": pa.string(),
    "caption": pa.string(),
    "media_type": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "num_frames": pa.int64(),
    "duration_sec": pa.float64(),
    "fps": pa.float64(),
}
TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""The strings that a `<name>_dtype` column may hold."""

# Rows are megabytes: small row groups keep the memory of writing and of reading one group low.
ROW_GROUP_BYTES = 64 * 2**20


DATA_PATH_KEY = "training.data.data_path"


class DataError(ValueError):
    """Data that can't be trained on: an empty data set, a bad row, rows that don't fit together."""


class ParquetSchemaError(ValueError):
    """A data file whose columns are not those of the schema."""


def tensor_columns(name: str) -> dict[str, pa.DataType]:
    """The three columns that store tensor `name`, with the types that the writer gives them.

    Bytes have 64-bit offsets, as some hundred clips in one row group pass 2 GiB.
    """
    return {f"{name}_bytes": pa.large_binary(), f"{name}_shape": pa.list_(pa.int64()), f"{name}_dtype": pa.string()}


def column_types(tensors: Sequence[str], scalars: Sequence[str]) -> dict[str, pa.DataType]:
    """Column name -> type of the given tensors and scalar columns, tensors first."""
    types = {column: kind for name in tensors for column, kind in tensor_columns(name).items()}
    return types | {name: SCALARS[name] for name in scalars}


def parse_dtype(text: str) -> torch.dtype:
    """The dtype that a `<name>_dtype` column names; a leading "torch." is allowed.

    Raises:
        ValueError: for another string.
    """
    name = text.removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise ValueError(f"dtype {text!r} is unknown; it must be one of {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one parquet file, zstd-compressed, under a temporary name that becomes `path` when it is complete.

    Args:
        path: the file; its directory is made, a file of this name is replaced.
        rows: per row, tensors (or arrays) under the names of `TENSORS` and values under those of `SCALARS`. All rows
            have the first one's keys; a tensor may be None, which stores an empty one (a text-only row).

    Raises:
        ValueError: for no rows, an unknown or a missing key, or a dtype that the schema has no name for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix keeps an incomplete file out of a data set's `*.parquet`.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        _write(partial, path, iter(rows))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write(partial: Path, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    names: list[str] = []
    writer: pq.ParquetWriter | None = None
    pending: list[dict[str, Any]] = []
    size = 0
    try:
        for index, row in enumerate(rows):
            if writer is None:
                names = _checked_names(path, row)
                types = column_types([n for n in TENSORS if n in names], [n for n in SCALARS if n in names])
                writer = pq.ParquetWriter(partial, pa.schema(list(types.items())), compression="zstd")
            elif set(row) != set(names):
                raise ValueError(f"{path}: row {index} has the keys {sorted(row)}, row 0 has {sorted(names)}")
            pending.append(_encode_row(row, where=f"{path}: row {index}"))
            size += sum(len(value) for value in pending[-1].values() if isinstance(value, bytes))
            if size >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(pending, schema=writer.schema))
                pending, size = [], 0
        if writer is None:
            raise ValueError(f"{path}: there are no rows to write")
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema=writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _checked_names(path: Path, row: Mapping[str, Any]) -> list[str]:
    unknown = [name for name in row if name not in TENSORS and name not in SCALARS]
    missing = [name for name in REQUIRED_TENSORS + REQUIRED_SCALARS if name not in row]
    if unknown or missing:
        raise ValueError(
            f"{path}: rows have unknown keys {unknown} and lack {missing}; "
            f"known tensors are {', '.join(TENSORS)}, known scalars {', '.join(SCALARS)}"
        )
    return list(row)


def _encode_row(row: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for name, value in row.items():
        if name in SCALARS:
            encoded[name] = value
        elif value is None:
            encoded |= {f"{name}_bytes": b"", f"{name}_shape": [], f"{name}_dtype": ""}
        else:
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            encoded |= {
                f"{name}_bytes": _to_bytes(tensor),
                f"{name}_shape": list(tensor.shape),
                f"{name}_dtype": _dtype_name(tensor, where=f"{where}, {name}"),
            }
    return encoded


def _to_bytes(tensor: Tensor) -> bytes:
    # NumPy has no bfloat16, and a view as bytes needs a dimension.
    array: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.tobytes()


def _dtype_name(tensor: Tensor, *, where: str) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise ValueError(
            f"{where}: dtype {name} has no name in the schema; convert it to one of {', '.join(TORCH_DTYPES)}"
        )
    return name


def check_schema(files: Sequence[Path], tensors: Sequence[str] | None = None) -> tuple[list[str], list[str], list[int]]:
    """Check the columns of one data set's files, from their metadata alone.

    Args:
        files: the parquet files.
        tensors: the tensors that must be there; None for those that the first file has.

    Returns:
        The tensors and the scalar columns that every file has, and the number of rows of each file.

    Raises:
        ParquetSchemaError: naming the file, the column, the expected and the found type.
    """
    num_rows: list[int] = []
    scalars = set(SCALARS)
    for file in files:
        metadata = read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
        if tensors is None:
            tensors = [name for name in TENSORS if name in REQUIRED_TENSORS or _has_any_column(schema, name)]
        for column, kind in column_types(tensors, REQUIRED_SCALARS).items():
            _check_column(file, schema, column, kind, required=True)
        for column, kind in SCALARS.items():
            _check_column(file, schema, column, kind, required=False)
        scalars &= set(schema.names)
        num_rows.append(metadata.num_rows)
    return list(tensors or ()), [name for name in SCALARS if name in scalars], num_rows


def read_metadata(file: Path) -> pq.FileMetaData:
    """A parquet file's footer.

    Raises:
        ParquetSchemaError: if the file isn't readable as parquet, for instance because it was cut off.
    """
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ParquetSchemaError(f"{file} is not a readable parquet file ({error}); write or copy it again") from error


def _has_any_column(schema: pa.Schema, tensor: str) -> bool:
    return any(column in schema.names for column in tensor_columns(tensor))


def _check_column(file: Path, schema: pa.Schema, column: str, expected: pa.DataType, *, required: bool) -> None:
    if schema.get_field_index(column) < 0:
        if not required:
            return
        found = ", ".join(schema.names) or "none"
        raise ParquetSchemaError(
            f"{file}: column {column!r} is missing (or there twice); expected {expected}, found the columns {found}. "
            "Write the file again, or point training.data.data_path at data sets whose files all have this column"
        )
    found_type = schema.field(column).type
    # A column of nothing but None has no type; the bytes of a text-only data set or an optional scalar may be such.
    is_empty = pa.types.is_null(found_type) and column not in REQUIRED_SCALARS
    if not (is_empty or _is_compatible(found_type, expected)):
        raise ParquetSchemaError(f"{file}: column {column!r} has a wrong type: expected {expected}, found {found_type}")


def _is_compatible(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether a column can be read as the expected type without losing anything."""
    if pa.types.is_string(expected):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if pa.types.is_large_binary(expected):
        return pa.types.is_binary(found) or pa.types.is_large_binary(found)
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and (pa.types.is_integer(found.value_type) or pa.types.is_null(found.value_type))
    if pa.types.is_floating(expected):
        return pa.types.is_floating(found) or pa.types.is_integer(found)
    return pa.types.is_integer(found)
