"""From clips on disk to a row of the table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from . import metrics
from .clips import Clip, ClipStore, Cost
from .frechet import Features, FrechetReference, clip_features

Scorer = Callable[[np.ndarray, str], float]
"""Frames `[F, H, W, 3]` and their prompt -> how well they go together."""

_PAIR_MEASURES = ("latent_mse", "latent_psnr", "latent_ssim", "pixel_mse", "psnr", "ssim")


@dataclass(frozen=True)
class Row:
    """One way to make clips. None stands for what is not measured; docs/evaluate.md defines the figures.

    The names that the digits demo's results.json has as well mean the same there.
    """

    name: str
    steps: int | None
    guidance: float | None
    clips: int
    forward_passes: float | None
    seconds: float | None
    seconds_per_clip: float | None
    latency_first_chunk_s: float | None
    frames_per_second: float | None
    peak_memory_bytes: int | None
    same_noise: bool | None
    latent_mse: float | None
    latent_psnr: float | None
    latent_ssim: float | None
    pixel_mse: float | None
    psnr: float | None
    ssim: float | None
    frechet_pixel: float | None
    frechet_motion: float | None
    motion: float
    flicker: float
    diversity: float | None
    brightness: float
    contrast: float
    clip_score: float | None


class Reference:
    """What rows are compared with.

    Args:
        store: its clips.
        paired: whether its clips are those of the other ways one by one; real clips are not.
    """

    def __init__(self, store: ClipStore, *, paired: bool) -> None:
        self.store = store
        self.paired = paired
        features = [clip_features(clip.frames) for clip in store]
        self._references = {name: FrechetReference(_stack(features, name)) for name in ("pixel", "motion")}
        self._shapes = {name: getattr(features[0], name).shape for name in self._references}

    def distances(self, features: Sequence[Features]) -> dict[str, float | None]:
        """`frechet_pixel` and `frechet_motion`; None for too few clips, or clips with another number of frames."""
        return {
            f"frechet_{name}": reference.distance(_stack(features, name))
            if getattr(features[0], name).shape == self._shapes[name]
            else None
            for name, reference in self._references.items()
        }

    def floors(self) -> dict[str, float | None]:
        """The distances between halves of the reference itself."""
        return {f"frechet_{name}": reference.floor() for name, reference in self._references.items()}


def measure_row(
    name: str,
    store: ClipStore,
    *,
    steps: int | None,
    guidance: float | None,
    prompts: Sequence[str],
    group_sizes: Sequence[int],
    reference: Reference | None,
    scorer: Scorer | None,
) -> Row:
    """Measure one way.

    Args:
        name: of the way.
        store: its clips.
        steps: of the sampler.
        guidance: of the sampler.
        prompts: of each clip.
        group_sizes: how many successive clips have the same prompt.
        reference: None for the reference's own row.
        scorer: for `clip_score`.
    """
    described, features, scores, shape = [], [], [], None
    for clip, prompt in zip(store, prompts, strict=True):
        described.append(metrics.describe_clip(clip.frames))
        shape = clip.frames.shape
        if reference is not None:
            features.append(clip_features(clip.frames))
        if scorer is not None:
            scores.append(scorer(clip.frames, prompt))
    assert shape is not None, "a way has at least one clip"
    clips = iter(store)
    diversities = [metrics.diversity(clip.frames for clip in islice(clips, size)) for size in group_sizes]
    figures: dict[str, Any] = {key: statistics.fmean(values[key] for values in described) for key in described[0]}
    figures |= _cost(_costs(store), num_frames=shape[0])
    figures |= {"frechet_pixel": None, "frechet_motion": None}
    if reference is not None:
        figures |= reference.distances(features)
    figures |= _pairs(store, reference)
    figures["diversity"] = _mean([value for value in diversities if value is not None])
    figures["clip_score"] = _mean(scores)
    rounded = {key: _rounded(value) for key, value in figures.items()}
    return Row(name=name, steps=steps, guidance=guidance, clips=len(described), **rounded)


def _costs(store: ClipStore) -> list[tuple[Cost, int]]:
    return [(batch.cost, len(batch.clips)) for batch in store.batches() if batch.cost is not None]


def _cost(costs: Sequence[tuple[Cost, int]], *, num_frames: int) -> dict[str, Any]:
    if not costs:
        names = ("forward_passes", "seconds", "seconds_per_clip", "latency_first_chunk_s", "frames_per_second")
        return dict.fromkeys((*names, "peak_memory_bytes"))
    # The median, since the first batch warms up.
    per_clip = statistics.median(cost.seconds / count for cost, count in costs)
    peaks = [cost.peak_memory_bytes for cost, _ in costs if cost.peak_memory_bytes is not None]
    passes = sum(cost.forward_passes * count for cost, count in costs) / sum(count for _, count in costs)
    return {
        "forward_passes": int(passes) if passes == int(passes) else passes,
        "seconds": sum(cost.seconds for cost, _ in costs),
        "seconds_per_clip": per_clip,
        "latency_first_chunk_s": statistics.median(cost.first_frames_seconds for cost, _ in costs),
        "frames_per_second": num_frames / per_clip,
        "peak_memory_bytes": max(peaks) if peaks else None,
    }


def _pairs(store: ClipStore, reference: Reference | None) -> dict[str, Any]:
    """Clip by clip against the reference; no figures where the noise isn't the same, since such pairs say nothing."""
    nothing: dict[str, Any] = dict.fromkeys(_PAIR_MEASURES)
    if reference is None or not reference.paired:
        return {"same_noise": None, **nothing}
    found: list[dict[str, float]] = []
    for clip, other in zip(store, reference.store, strict=True):
        if clip.noise != other.noise:
            return {"same_noise": False, **nothing}
        found.append(_pair(clip, other))
    return {"same_noise": True, **{key: _mean([row[key] for row in found if key in row]) for key in _PAIR_MEASURES}}


def _pair(clip: Clip, other: Clip) -> dict[str, float]:
    figures: dict[str, float] = {}
    if clip.frames.shape == other.frames.shape:
        figures |= metrics.compare_frames(clip.frames, other.frames)
    if clip.latents is not None and other.latents is not None and clip.latents.shape == other.latents.shape:
        figures |= metrics.compare_latents(clip.latents, other.latents)
    return figures


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _stack(features: Sequence[Features], name: str) -> np.ndarray:
    return np.stack([getattr(row, name) for row in features])
