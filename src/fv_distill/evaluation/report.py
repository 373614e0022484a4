"""The figures as tables: which columns there are, what they mean, how they are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .frechet import MINIMUM_CLIPS, RELIABLE_CLIPS
from .measure import Row


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the row.
        title: its heading.
        meaning: one line for readers of the page.
        format: of its figures.
        scale: what figures are multiplied by.
    """

    key: str
    title: str
    meaning: str
    format: str = ".3f"
    scale: float = 1.0


@dataclass(frozen=True)
class Table:
    """Columns that belong together."""

    title: str
    columns: tuple[Column, ...]


TABLES = (
    Table(
        "Cost",
        (
            Column("steps", "steps", "of the sampler", "d"),
            Column("guidance", "guidance", "scale; 1 makes no unconditional pass", "g"),
            Column(
                "forward_passes", "network calls", "per clip, counted; a streaming student's take one chunk each", "g"
            ),
            Column("seconds_per_clip", "s per clip", "median, from the first network call to the last frame", ".3g"),
            Column("latency_first_chunk_s", "s to first frames", "median, of a whole batch unless it streams", ".3g"),
            Column("frames_per_second", "frames/s", "frames of a clip over its seconds", ".1f"),
            Column("peak_memory_bytes", "peak GB", "allocated on the accelerator; on a CPU the process's", ".2f", 1e-9),
        ),
    ),
    Table(
        "Clip by clip, against the reference's clip from the same noise",
        (
            Column("same_noise", "same noise", "whether the networks were first called with the same values", ""),
            Column("latent_mse", "latent MSE", "mean squared difference of normalised latents", ".4f"),
            Column("latent_psnr", "latent PSNR", "dB, the peak being the range of the reference's values", ".1f"),
            Column("latent_ssim", "latent SSIM", "1 for equal latents"),
            Column("pixel_mse", "pixel MSE", "mean squared difference, white being 1", ".4f"),
            Column("psnr", "PSNR", "dB; 100 for equal clips", ".1f"),
            Column("ssim", "SSIM", "of the luma; 1 for equal clips"),
        ),
    ),
    Table(
        "Sets of clips",
        (
            Column("clips", "clips", "how many there are", "d"),
            Column("frechet_pixel", "Frechet, frames", "distance of small frames to the reference's; less is nearer"),
            Column("frechet_motion", "Frechet, changes", "the same of differences of frames; less is nearer"),
            Column("motion", "motion", "mean absolute difference of successive frames", ".4f"),
            Column("flicker", "flicker", "1 for alternating frames, 3/4 for unrelated ones, 0 for even change"),
            Column("diversity", "diversity", "RMS difference of clips of one prompt"),
            Column("brightness", "brightness", "mean luma"),
            Column("contrast", "contrast", "standard deviation of the luma within a frame"),
            Column("clip_score", "CLIP score", "100 cos(frame, prompt)", ".2f"),
        ),
    ),
)

_NOTHING = "-"


def shown_columns(table: Table, rows: Sequence[Row]) -> list[Column]:
    """The columns in which any row has a figure."""
    return [column for column in table.columns if any(getattr(row, column.key) is not None for row in rows)]


def shown_rows(table: Table, rows: Sequence[Row]) -> list[Row]:
    """The rows that have any figure: the reference has none against itself."""
    return [row for row in rows if any(getattr(row, column.key) is not None for column in table.columns)]


def cell(row: Row, column: Column) -> str:
    """A figure as text; few clips' Frechet distances get a tilde."""
    value = getattr(row, column.key)
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = format(value if column.format == "d" else value * column.scale, column.format)
    unsure = column.key.startswith("frechet") and row.clips < RELIABLE_CLIPS
    return f"~{text}" if unsure else text


def frechet_note(rows: Sequence[Row], floors: Mapping[str, float | None]) -> str:
    """What to think of the Frechet distances."""
    fewest = min(row.clips for row in rows)
    if fewest < MINIMUM_CLIPS:
        return f"Frechet distances need {MINIMUM_CLIPS} clips of each side at the least; the fewest here are {fewest}."
    if all(row.frechet_pixel is None for row in rows):
        return "No Frechet distances: the clips have not as many frames as the reference's."
    parts = [f"{floors[key]:.3f} ({name})" for key, name in _FRECHET if floors[key] is not None]
    note = f"Two halves of the reference are {', '.join(parts)} apart, by chance alone. " if parts else ""
    if fewest < RELIABLE_CLIPS:
        note += f"~: of less than {RELIABLE_CLIPS} clips a Frechet distance is largely such chance."
    return note.strip()


_FRECHET = (("frechet_pixel", "frames"), ("frechet_motion", "changes"))


def to_markdown(title: str, rows: Sequence[Row], facts: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The tables as Markdown."""
    lines = [f"# {title}", "", *(f"- {key}: {_escaped(str(value))}" for key, value in facts.items())]
    for table in TABLES:
        columns = shown_columns(table, rows)
        # There is nothing to pair with real clips.
        if not columns:
            continue
        lines += ["", f"## {table.title}", "", f"| | {' | '.join(column.title for column in columns)} |"]
        lines += [f"|---|{'---:|' * len(columns)}"]
        lines += [f"| {_escaped(row.name)} | {' | '.join(cell(row, column) for column in columns)} |" for row in rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
