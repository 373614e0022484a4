"""The evaluation as one HTML file that needs no network: what it shows is in it, or lies beside it."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .measure import Row
from .report import TABLES, cell, shown_columns

# Browsers and mail still handle a page of this size; what doesn't fit is linked.
EMBEDDED_BYTES = 32 * 2**20
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
    pixelated: bool,
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
        pixelated: whether clips are so small that their pixels are shown as squares.
        max_embedded_bytes: how much to embed; further files are linked.
    """
    sources = _Sources(path.parent, max_embedded_bytes)
    clips = [{"prompt": prompt, "kind": file.suffix[1:], "source": sources.of(file)} for prompt, file in videos]
    environment = Environment(
        loader=PackageLoader("fv_distill.evaluation", package_path=""), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("page.html.j2").render(
        title=title,
        facts=facts,
        notes=notes,
        tables=_tables(rows),
        clips=clips,
        clips_note=f"The first clip of each prompt: {', '.join(row.name for row in rows)}.{sources.note}",
        card_width=min(1120, 150 * len(rows) + 40),
        rendering="pixelated" if pixelated else "auto",
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
                for row in rows
            ]
            tables.append({"title": table.title, "columns": columns, "rows": body})
    return tables
