"""How good generated clips are: two Frechet distances to real clips, and how often the judge reads the caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from judge import JUDGE_FILE, load_judge
from torch import Tensor

from fv_distill.data.digits import NUM_FRAMES, Motion, sample_clips

REFERENCE_CLIPS = 4000
REFERENCE_SEED = 77
PIXEL_COMPONENTS = 48
# Dead features are left out: live ones deviate by more than 2, and one that fires on a few clips in a thousand would
# dominate the distance once divided by its tiny deviation.
_SMALLEST_DEVIATION = 0.1


@dataclass(frozen=True)
class Quality:
    """Frechet distances on standardised judge features and on pixel components, and prompt accuracy in [0, 1]."""

    frechet_cnn: float
    frechet_pixel: float
    prompt_accuracy: float


class Evaluator:
    """Compares clips with a fixed reference set of real training clips.

    Args:
        motion: of the real clips.
        frames: which five frames of the real clips, for a part of a longer clip.
        judge_file: a judge of that motion.
    """

    def __init__(
        self, *, motion: Motion = "wall", frames: Sequence[int] = range(NUM_FRAMES), judge_file: Path = JUDGE_FILE
    ) -> None:
        self.judge = load_judge(judge_file)
        generator = torch.Generator().manual_seed(REFERENCE_SEED)
        real = sample_clips("train", REFERENCE_CLIPS, generator, motion=motion, frames=frames).clips
        features, _ = self.judge.classify(real)
        deviation = features.std(0)
        self._kept = deviation > _SMALLEST_DEVIATION
        self._deviation = deviation[self._kept]
        self._real_features = self._standardise(features)
        self._components = principal_components(real.flatten(1).numpy(), PIXEL_COMPONENTS)
        self._real_pixels = real.flatten(1).numpy() @ self._components

    def __call__(self, clips: Tensor, captions: Tensor) -> Quality:
        """The quality of clips `[N, 1, 5, 16, 16]` in [-1, 1] that were asked for by caption index `[N]`."""
        clips = clips.clamp(-1, 1)
        features, read = self.judge.classify(clips)
        return Quality(
            frechet_cnn=frechet_distance(self._standardise(features), self._real_features),
            frechet_pixel=frechet_distance(clips.flatten(1).numpy() @ self._components, self._real_pixels),
            prompt_accuracy=(read == captions).float().mean().item(),
        )

    def _standardise(self, features: Tensor) -> np.ndarray:
        return (features[:, self._kept] / self._deviation).numpy()


def principal_components(rows: np.ndarray, count: int) -> np.ndarray:
    """The `count` directions of largest variance of rows `[N, D]`, as orthonormal columns `[D, count]`."""
    _, vectors = np.linalg.eigh(np.cov(rows.astype(np.float64), rowvar=False))
    return vectors[:, ::-1][:, :count].copy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """`|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))` between Gaussian fits (Heusel et al. 2017, eq. 6)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root_b = _square_root(covariance_b)
    # (C_a C_b)^(1/2) and the symmetric (B C_a B)^(1/2) with B = C_b^(1/2) have the same trace.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_b @ covariance_a @ root_b), 0, None)).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
