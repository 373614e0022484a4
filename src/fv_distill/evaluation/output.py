"""The files of an evaluation: evaluation.json, .md and .html, videos and the contact sheet."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import fv_distill
from fv_distill.callbacks.video_files import best_suffix, write_video
from fv_distill.console import console

from .clips import ClipStore
from .measure import Row
from .page import write_page
from .pictures import contact_sheet, side_by_side
from .plan import Plan
from .report import frechet_note, to_markdown

_LIBRARIES = ("torch", "diffusers", "transformers")


def write_report(
    plan: Plan,
    stores: Mapping[str, ClipStore],
    rows: Sequence[Row],
    floors: Mapping[str, float | None],
    output: Path,
    *,
    asked: Mapping[str, Any],
    num_videos: int,
    fps: float,
) -> None:
    """Write all files.

    Args:
        plan: what was evaluated.
        stores: the clips of each way.
        rows: the figures.
        floors: see `Reference.floors`.
        output: the directory.
        asked: the model, the reference and the scorer, as the user named them.
        num_videos: prompts to show.
        fps: of the videos.
    """
    versions = {"fv_distill": fv_distill.__version__, **{name: version(name) for name in _LIBRARIES}}
    settings = {**asked, **plan.settings(), "fps": fps}
    results = {"rows": [asdict(row) for row in rows], "floors": floors, "settings": settings, "versions": versions}
    text = json.dumps(results, indent=2, allow_nan=False)
    (output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    title = f"{plan.model.name} against {rows[0].name}"
    notes = _notes(rows, floors)
    facts = _facts(plan, asked)
    (output / "evaluation.md").write_text(to_markdown(title, rows, facts, notes), encoding="utf-8")

    shown = _first_clips(plan, stores, num_videos)
    contact_sheet(shown).save(output / "contact_sheet.png")
    videos = [(prompt, side_by_side(clips)) for prompt, clips in shown]
    page = output / "evaluation.html"
    write_page(
        page,
        title=title,
        rows=rows,
        facts=facts,
        notes=notes,
        videos=_write_videos(videos, output / "videos", fps=fps),
        sheet=output / "contact_sheet.png",
        settings={**settings, "versions": versions},
        video_size=videos[0][1].shape[1:3],
    )
    console.print(f"wrote {page}", highlight=False, markup=False, soft_wrap=True)


def _facts(plan: Plan, asked: Mapping[str, Any]) -> dict[str, Any]:
    size = plan.size
    shape = "as the pipelines have it"
    if None not in (size.num_frames, size.height, size.width):
        shape = f"{size.num_frames} frames of {size.width} x {size.height}"
    return {
        "model": asked["model"],
        "reference": asked["reference"],
        "prompts": len(plan.prompts),
        "clips of each prompt": plan.num_clips,
        "clip": shape,
        "where": f"{plan.device.type}, {plan.settings()['dtype']}, batches of {plan.batch_size}, seed {plan.seed}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _notes(rows: Sequence[Row], floors: Mapping[str, float | None]) -> list[str]:
    notes = [frechet_note(rows, floors)]
    differing = [row.name for row in rows if row.same_noise is False]
    if differing:
        notes.append(
            f"Not compared clip by clip, since they start from other noise than {rows[0].name}: {', '.join(differing)}."
        )
    return notes


def _first_clips(
    plan: Plan, stores: Mapping[str, ClipStore], num_videos: int
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The first clip of the first prompts, of every way."""
    shown: list[tuple[str, dict[str, np.ndarray]]] = [(prompt, {}) for prompt in plan.prompts[:num_videos]]
    for way in plan.ways:
        first = 0
        for (_, clips), size in zip(shown, plan.group_sizes(way), strict=False):
            batch_start = first // plan.batch_size * plan.batch_size
            clips[way.name] = stores[way.name].load(batch_start).clips[first - batch_start].frames
            first += size
    return shown


def _write_videos(videos: Sequence[tuple[str, np.ndarray]], directory: Path, *, fps: float) -> list[tuple[str, Path]]:
    directory.mkdir(exist_ok=True)
    written = []
    for index, (prompt, frames) in enumerate(videos):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
        path = directory / f"{index:03d}_{slug}{best_suffix()}"
        write_video(path, frames, fps=fps)
        written.append((prompt, path))
    return written
