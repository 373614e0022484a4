"""The evaluation as one HTML file that needs no network: what it shows is in it, or lies beside it."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .measure import Row
from .report import TABLES, cell, shown_columns, shown_rows

# Browsers and mail still handle a page of this size; what doesn't fit is linked.
EMBEDDED_BYTES = 32 * 2**20
# Of a card: its padding and border.
_CARD_MARGIN = 22
_CONTROLS_HEIGHT = 240
_KINDS = {"mp4": "video/mp4", "gif": "image/gif", "png": "image/png"}


def write_page(
    path: Path,
    *,
    title: str,
    rows: Sequence[Row],
    facts: Mapping[str, Any],
    notes: Sequence[str],
    videos: Sequence[tuple[str, Path]],
    sheet: Path,
    settings: Mapping[str, Any],
    video_size: tuple[int, int],
    max_embedded_bytes: int = EMBEDDED_BYTES,
) -> None:
    """Write the page.

    Args:
        path: the file.
        title: its heading.
        rows: of the tables; the last is the model's.
        facts: what is said above them.
        notes: what is said below them.
        videos: prompts and their side-by-side files, in or below the page's directory.
        sheet: the picture of frames.
        settings: shown at the end.
        video_size: height and width of the videos, in pixels.
        max_embedded_bytes: how much to embed; further files are linked.
    """
    sources = _Sources(path.parent, max_embedded_bytes)
    clips = [{"prompt": prompt, "kind": file.suffix[1:], "source": sources.of(file)} for prompt, file in videos]
    environment = Environment(loader=PackageLoader("fv_distill.evaluation"), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("page.html.j2").render(
        title=title,
        facts=facts,
        notes=notes,
        tables=_tables(rows),
        clips=clips,
        clips_note=f"The first clip of each prompt: {' | '.join(row.name for row in rows)}.{sources.note}",
        card_width=min(1120, video_size[1] + _CARD_MARGIN),
        # A browser's controls would cover small ones.
        controls=video_size[0] >= _CONTROLS_HEIGHT,
        sheet=sources.of(sheet),
        settings=json.dumps(settings, indent=2),
    )
    path.write_text(html, encoding="utf-8")


class _Sources:
    """Files as data URLs, up to a limit, then as relative links."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._left = limit
        self._linked = False

    @property
    def note(self) -> str:
        return " Some files are linked, not embedded: keep them beside this page." if self._linked else ""

    def of(self, file: Path) -> str:
        size = file.stat().st_size * 4 // 3
        if size > self._left:
            self._linked = True
            return file.relative_to(self._directory).as_posix()
        self._left -= size
        return f"data:{_KINDS[file.suffix[1:]]};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    tables = []
    for table in TABLES:
        columns = shown_columns(table, rows)
        if columns:
            body = [
                {
                    "name": row.name,
                    "is_model": row is rows[-1],
                    "cells": [cell(row, column) for column in columns],
                }
                for row in shown_rows(table, rows)
            ]
            tables.append({"title": table.title, "columns": columns, "rows": body})
    return tables
