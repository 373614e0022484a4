"""`evaluate`: make the clips of every way, measure them, write the report."""

import gc
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fv_distill.console import console

from .clip_score import ClipScorer
from .clips import ClipStore, same_settings
from .measure import Reference, Row, Scorer, measure_row
from .output import write_report
from .plan import Plan, make_plan
from .real_clips import RealSampler
from .sampling import PipelineSampler, Sampler, StreamSampler
from .ways import ClipSize, Way

_SECONDS_BETWEEN_LINES = 15


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        rows: the reference, then it in other step counts, the model last.
        floors: Frechet distances between halves of the reference, which are chance alone.
        directory: where everything is; `evaluation.html` in it is the report.
    """

    rows: tuple[Row, ...]
    floors: Mapping[str, float | None]
    directory: Path


def evaluate(
    model: str | Path,
    reference: str | Path,
    prompts: Sequence[str] = (),
    *,
    output_dir: str | Path = "outputs/evaluation",
    num_clips: int = 1,
    seed: int = 0,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    reference_steps: int | None = None,
    reference_guidance: float | None = None,
    extra_steps: Sequence[int] = (),
    negative_prompt: str | None = None,
    max_prompts: int | None = None,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    clip_score: str | Path | None = None,
    num_videos: int = 8,
    fps: float = 16,
    model_name: str = "student",
    reference_name: str = "teacher",
    overwrite: bool = False,
) -> Evaluation:
    """Compare a model with a reference on the same prompts and the same noise; docs/evaluate.md defines the figures.

    Clips that are already in `output_dir` are kept, so that an interrupted evaluation goes on.

    Args:
        model: an export of a student, streaming or not, or any diffusers directory or Hub id.
        reference: such a directory or Hub id; or parquet rows of real clips, a file or a directory.
        prompts: texts, or files of them (.txt, .json, .jsonl); with real clips, none takes all their captions.
        output_dir: where clips and report go.
        num_clips: clips, and so noises, of each prompt.
        seed: of the noise.
        num_frames: of the clips; None is the length of the clips that the model was trained on.
        height: in pixels, likewise.
        width: in pixels, likewise.
        num_inference_steps: of a model that was not distilled to a few steps; None is its pipeline's default.
        guidance_scale: of the model; None is 1 for a few-step student and else its pipeline's default.
        reference_steps: of the reference; None is its pipeline's default.
        reference_guidance: of the reference; None is its pipeline's default.
        extra_steps: further step counts of the reference.
        negative_prompt: of guidance's other pass; None is the pipeline's own.
        max_prompts: take only the first prompts.
        batch_size: clips at a time of a pipeline; a streaming student makes them one by one.
        device: None is an accelerator where there is one.
        dtype: of the weights; None is bfloat16 on an accelerator and float32 on a CPU.
        clip_score: a CLIP model's directory or Hub id, to score frames against prompts.
        num_videos: prompts whose first clips are shown.
        fps: of the videos.
        model_name: of the model's row.
        reference_name: of the reference's rows.
        overwrite: make anew the clips that were made with other settings.

    Raises:
        FileNotFoundError: if there is no such model, data set or file of prompts.
        ValueError: for options that don't fit each other or the models, or clips that were made with other settings.
    """
    if num_videos < 1 or fps <= 0:
        raise ValueError(f"num_videos={num_videos} must be at least 1 and fps={fps:g} positive")
    plan = make_plan(
        model,
        reference,
        prompts,
        names=(model_name, reference_name),
        size=ClipSize(num_frames, height, width),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        reference_steps=reference_steps,
        reference_guidance=reference_guidance,
        extra_steps=extra_steps,
        max_prompts=max_prompts,
        num_clips=num_clips,
        seed=seed,
        batch_size=batch_size,
        negative_prompt=negative_prompt,
        device=device,
        dtype=dtype,
    )
    output = Path(output_dir)
    # Loaded first: a scorer that isn't there must not be noticed after hours of sampling.
    scorer = None if clip_score is None else ClipScorer(clip_score, device=plan.device)
    stores = {way.name: _open_store(plan, way, output / "clips", overwrite=overwrite) for way in plan.ways}
    make_clips(plan, stores)
    rows, floors = measure(plan, stores, scorer)
    asked = {"model": str(model), "reference": str(reference), "clip_score": clip_score and str(clip_score)}
    write_report(plan, stores, rows, floors, output, asked=asked, num_videos=num_videos, fps=fps)
    return Evaluation(tuple(rows), floors, output)


def make_clips(plan: Plan, stores: Mapping[str, ClipStore]) -> None:
    """Make what is not there yet, the model's clips first: its mistakes should show before the reference's hours."""
    pipeline: Any = None
    loaded: Path | None = None
    for way in sorted(plan.ways, key=lambda way: way is not plan.model):
        prompts, store = plan.clip_prompts(way), stores[way.name]
        missing = [first for first in range(0, len(prompts), plan.batch_size) if not store.has(first)]
        if not missing:
            continue
        if loaded != way.directory:
            # Two large models are not held at once.
            pipeline, loaded = None, None
            _free_memory(plan.device)
        sampler = _open_sampler(plan, way, pipeline)
        if isinstance(sampler, PipelineSampler):
            pipeline, loaded = sampler.pipeline, way.directory
        _fill(way, store, sampler, prompts, missing, plan.batch_size)
        del sampler
    del pipeline
    _free_memory(plan.device)


def measure(
    plan: Plan, stores: Mapping[str, ClipStore], scorer: Scorer | None
) -> tuple[list[Row], Mapping[str, float | None]]:
    """A row for each way, and what chance makes of the Frechet distances."""
    first = plan.ways[0]
    reference = Reference(stores[first.name], paired=first.kind != "real")
    rows = [
        measure_row(
            way.name,
            stores[way.name],
            steps=way.steps,
            guidance=way.guidance,
            prompts=plan.clip_prompts(way),
            group_sizes=plan.group_sizes(way),
            reference=None if way is first else reference,
            scorer=scorer,
        )
        for way in plan.ways
    ]
    return rows, reference.floors()


def _open_store(plan: Plan, way: Way, directory: Path, *, overwrite: bool) -> ClipStore:
    path = directory / re.sub(r"[^a-z0-9]+", "-", way.name.lower()).strip("-")
    settings = plan.way_settings(way)
    if overwrite and not same_settings(path, settings):
        shutil.rmtree(path)
    return ClipStore(path, settings)


def _open_sampler(plan: Plan, way: Way, pipeline: Any) -> Sampler:
    if way.kind == "real":
        assert plan.real is not None
        rows = [row for rows in plan.real_rows for row in rows]
        options: dict[str, Any] = {"num_frames": plan.size.num_frames, "device": plan.device, "dtype": plan.dtype}
        return RealSampler(plan.real, rows, plan.model.directory, **options)
    options = {"seed": plan.seed, "negative_prompt": plan.negative_prompt, "device": plan.device, "dtype": plan.dtype}
    if way.kind == "stream":
        return StreamSampler(way, plan.size, **options)
    return PipelineSampler(way, plan.size, pipeline=pipeline, **options)


def _fill(
    way: Way, store: ClipStore, sampler: Sampler, prompts: Sequence[str], missing: Sequence[int], batch_size: int
) -> None:
    begun = told = time.monotonic()
    done = 0
    for first in missing:
        chosen = prompts[first : first + batch_size]
        store.save(first, sampler.sample(chosen, range(first, first + len(chosen))))
        done += len(chosen)
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            console.print(f"{way.name}: {done} clips, {told - begun:.0f} s", highlight=False, markup=False)
    text = f"{way.name}: {done} clips in {time.monotonic() - begun:.1f} s"
    console.print(text, highlight=False, markup=False)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
