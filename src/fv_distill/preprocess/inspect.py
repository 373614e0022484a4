"""`fv-distill inspect`: what a directory of rows holds, and a picture of some clips."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from fv_distill.callbacks.video_files import contact_sheet, preview
from fv_distill.console import console
from fv_distill.data.parquet import decode_tensor, find_parquet_files
from fv_distill.data.schema import TENSORS, DataError, check_schema, tensor_columns
from fv_distill.models.encoders import Encoders
from fv_distill.models.pretrained import resolve_directory

from .families import encoders_class
from .run import SETTINGS_FILE

_SHEET_FRAMES = 5
_SHEET_SIDE = 160
_SHOWN_CAPTION = 60


@dataclass(frozen=True)
class Overview:
    """What the columns of all rows say, without a look into the tensors.

    Attributes:
        num_rows: rows in all files.
        num_files: files.
        shapes: tensor -> its shapes and stored types, as text -> rows with it; of texts the number of tokens is left
            open.
        tokens: the least and the most tokens of a text.
        num_captions: distinct ones.
    """

    num_rows: int
    num_files: int
    shapes: dict[str, dict[str, int]]
    tokens: tuple[int, int]
    num_captions: int


def inspect_rows(
    directory: Path,
    *,
    num_rows: int = 8,
    num_samples: int = 4,
    output: Path | None = None,
    model: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
) -> Overview:
    """Print what rows there are and draw some of them.

    Args:
        directory: of parquet files, or one file.
        num_rows: how many to list.
        num_samples: how many clips to decode.
        output: the picture; None is `contact_sheet.png` beside the rows.
        model: whose VAE decodes; None is the one that `preprocess` encoded with.
        adapter: see `encoders_class`.
        device: of the VAE; None is an accelerator where there is one.

    Raises:
        FileNotFoundError: for a directory or a model that isn't there.
        ValueError: for files of another schema.
        DataError: for a directory without rows, or a row that is damaged.
    """
    files = find_parquet_files(str(directory))
    tensors, _, counts = check_schema(files)
    if not sum(counts):
        raise DataError(f"{directory} holds no rows")
    overview = read_overview(files, tensors)
    _print_overview(overview)
    rows = read_rows(files, counts, _spread(sum(counts), num_rows))
    _print_rows(rows)
    has_clips = "vae_latent" in overview.shapes
    if num_samples and has_clips:
        home = directory if directory.is_dir() else directory.parent
        encoders = _encoders(home, model, adapter, device)
        if encoders is None:
            console.print(f"no picture: {home} has no {SETTINGS_FILE} that names a model; give --model")
            return overview
        samples = read_rows(files, counts, _spread(sum(counts), num_samples))
        path = output or home / "contact_sheet.png"
        draw_samples(samples, encoders).save(path)
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return overview


def read_overview(files: Sequence[Path], tensors: Sequence[str]) -> Overview:
    """Read it from the small columns of all files."""
    shapes: dict[str, Counter[str]] = {name: Counter() for name in tensors}
    lengths: list[int] = []
    captions: set[int] = set()
    num_rows = 0
    for path in files:
        columns = [column for name in tensors for column in tensor_columns(name) if not column.endswith("_bytes")]
        table = pq.read_table(path, columns=[*columns, "caption"])
        num_rows += len(table)
        # Hashes, as the captions of a large data set are gigabytes.
        captions.update(hash(caption) for caption in table["caption"].to_pylist())
        for name in tensors:
            stored = zip(table[f"{name}_shape"].to_pylist(), table[f"{name}_dtype"].to_pylist(), strict=True)
            for shape, dtype in stored:
                if not shape:
                    continue
                if name == "text_embedding":
                    lengths.append(shape[0])
                    shape = ["tokens", *shape[1:]]
                shapes[name][f"[{', '.join(map(str, shape))}] {dtype}"] += 1
    kept = {name: dict(found.most_common()) for name, found in shapes.items() if found}
    tokens = (min(lengths), max(lengths)) if lengths else (0, 0)
    return Overview(num_rows, len(files), kept, tokens, len(captions))


def read_rows(files: Sequence[Path], counts: Sequence[int], wanted: Sequence[int]) -> list[dict[str, Any]]:
    """Whole rows by their numbers, which ascend; tensors in their stored types."""
    rows: list[dict[str, Any]] = []
    start = 0
    for path, count in zip(files, counts, strict=True):
        inside = [number - start for number in wanted if start <= number < start + count]
        start += count
        if not inside:
            continue
        with pq.ParquetFile(path) as opened:
            first = 0
            for group in range(opened.num_row_groups):
                size = opened.metadata.row_group(group).num_rows
                here = [number - first for number in inside if first <= number < first + size]
                if here:
                    table = opened.read_row_group(group)
                    rows += [_decoded(table.slice(number, 1), f"{path}: row {first + number}") for number in here]
                first += size
    return rows


def _decoded(table: Any, place: str) -> dict[str, Any]:
    row: dict[str, Any] = {"place": place}
    present = [name for name in TENSORS if f"{name}_bytes" in table.column_names]
    for name in present:
        stored = table.select(list(tensor_columns(name))).cast(pa.schema(list(tensor_columns(name).items())))
        try:
            row[name] = decode_tensor(stored, name, check_values=True)
        except ValueError as error:
            raise DataError(f"{place}, column {name}: {error}") from error
    taken = {column for name in present for column in tensor_columns(name)}
    return row | {name: table.column(name)[0].as_py() for name in table.column_names if name not in taken}


def draw_samples(rows: Sequence[dict[str, Any]], encoders: Encoders) -> Image.Image:
    """A line of frames of each row's clip under its caption; clips of several shapes stand on equal ground."""
    clips, captions = [], []
    for row in rows:
        if row["vae_latent"] is None:
            continue
        frames = decode_frames(row["vae_latent"], encoders)
        clips.append(preview(frames, max_frames=_SHEET_FRAMES, max_side=_SHEET_SIDE))
        captions.append(f"{row.get('id') or row['place']}  {list(row['vae_latent'].shape)}  {row['caption']}")
    height, width = (max(clip.shape[axis] for clip in clips) for axis in (1, 2))
    length = max(len(clip) for clip in clips)
    return contact_sheet([_padded(clip, length, height, width) for clip in clips], captions)


@torch.no_grad()
def decode_frames(latents: Tensor, encoders: Encoders) -> np.ndarray:
    """Raw latents `[C, T, h, w]` as frames, uint8 `[F, H, W, 3]`."""
    video = encoders.decode(latents[None].float().to(encoders.device))[0]
    return (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).cpu().numpy()


def _padded(clip: np.ndarray, length: int, height: int, width: int) -> np.ndarray:
    ground = np.full((length, height, width, 3), 255, dtype=np.uint8)
    ground[: len(clip), : clip.shape[1], : clip.shape[2]] = clip
    return ground


def _encoders(home: Path, model: str | None, adapter: str | None, device: str | None) -> Encoders | None:
    settings = home / SETTINGS_FILE
    stored = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    name = model or stored.get("model")
    if name is None:
        return None
    directory = resolve_directory(name, name="model")
    kind = encoders_class(directory, adapter or (stored.get("adapter") if model is None else None))
    chosen = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    return kind(directory, device=chosen, dtype=torch.float32, text_length=stored.get("text_length", 512))


def _spread(total: int, count: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, total - 1, min(count, total))})


def _print_overview(overview: Overview) -> None:
    console.print(f"{overview.num_rows} rows in {overview.num_files} files, {overview.num_captions} distinct captions")
    table = Table("tensor", "shape and type", "rows")
    for name, found in overview.shapes.items():
        for shape, count in found.items():
            table.add_row(name, shape, str(count))
    console.print(table, markup=False)
    if "text_embedding" in overview.shapes:
        console.print(f"texts have {overview.tokens[0]} to {overview.tokens[1]} tokens")


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("id", "size", "frames", "fps", "tokens", "caption")
    for row in rows:
        size = f"{row['height']}x{row['width']}" if row.get("height") else ""
        fps = f"{row['fps']:g}" if row.get("fps") else ""
        tokens = "" if row["text_embedding"] is None else str(len(row["text_embedding"]))
        caption = row["caption"] or ""
        shown = caption if len(caption) <= _SHOWN_CAPTION else f"{caption[:_SHOWN_CAPTION]}..."
        table.add_row(row.get("id") or row["place"], size, str(row.get("num_frames") or ""), fps, tokens, shown)
    console.print(table, markup=False)
