"""Frechet distances on features that need no network: small frames and their differences, in principal components.

`frechet_pixel` sees what is in the frames, `frechet_motion` how they change. They tell sets of clips apart as coarsely
as such features do; FVD and its like need networks that would have to be downloaded.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from .metrics import to_unit

SIDE = 16
FRAMES = 8
COMPONENTS = 48
"""As many as in the digits demo, whose pixel distance this is for grey clips of up to 8 frames of 16 x 16."""

MINIMUM_CLIPS = 2 * COMPONENTS
"""Below it a covariance of the components is hardly more than noise: no distance is given."""

RELIABLE_CLIPS = 1000
"""Below it a distance is largely chance, see docs/evaluate.md; the table marks it."""


@dataclass(frozen=True)
class Features:
    """Of one clip: rows of `pixel` are small frames, rows of `motion` the changes between frames."""

    pixel: np.ndarray
    motion: np.ndarray


def clip_features(frames: np.ndarray) -> Features:
    """Up to 8 evenly spaced frames, and as many differences of successive frames, averaged to at most 16 x 16 pixels.

    Values are scaled to [-1, 1] and divided by the root of 3, so that a grey clip counts once and not once a channel.
    """
    values = to_unit(frames).permute(0, 3, 1, 2) * (2 / 3**0.5) - 1 / 3**0.5
    height, width = values.shape[-2:]
    small = adaptive_avg_pool2d(values, (min(SIDE, height), min(SIDE, width)))
    changes = small.diff(dim=0) if len(small) > 1 else torch.zeros_like(small)
    return Features(*(part[_evenly_spaced(len(part))].flatten().numpy() for part in (small, changes)))


class FrechetReference:
    """The principal components of a reference set, and the distance of other sets to it.

    Args:
        rows: features of the reference clips, `[N, D]`.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self._mean = rows.mean(axis=0)
        self._components = principal_components(rows, COMPONENTS)
        self._rows = self._project(rows)

    def distance(self, rows: np.ndarray) -> float | None:
        """The distance of clips with features `[M, D]`; None where either side has less than `MINIMUM_CLIPS`."""
        return _distance(self._project(rows), self._rows)

    def floor(self) -> float | None:
        """The distance between two random halves of the reference set, which is nothing but noise."""
        order = np.random.default_rng(0).permutation(len(self._rows))
        half = len(order) // 2
        return _distance(self._rows[order[:half]], self._rows[order[half:]])

    def _project(self, rows: np.ndarray) -> np.ndarray:
        return (rows.astype(np.float64) - self._mean) @ self._components


def principal_components(rows: np.ndarray, count: int) -> np.ndarray:
    """The (at most) `count` directions of largest variance of rows `[N, D]`, as orthonormal columns `[D, count]`."""
    centred = rows.astype(np.float64) - rows.mean(axis=0)
    if len(centred) > centred.shape[1]:
        _, vectors = np.linalg.eigh(centred.T @ centred)
        return vectors[:, ::-1][:, :count].copy()
    # The smaller of the two products: a thousand clips have fewer rows than a small frame has pixels.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    kept = values > values[0] * 1e-10 if values[0] > 0 else np.zeros(len(values), dtype=bool)
    return (centred.T @ vectors[:, kept]) / np.sqrt(values[kept])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """`|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))` of Gaussian fits (Heusel et al. 2017, eq. 6)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
    root_b = _square_root(covariance_b)
    # (C_a C_b)^(1/2) and the symmetric (B C_a B)^(1/2) with B = C_b^(1/2) have the same trace.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_b @ covariance_a @ root_b), 0, None)).sum()
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def _distance(a: np.ndarray, b: np.ndarray) -> float | None:
    if min(len(a), len(b)) < MINIMUM_CLIPS or a.shape[1] == 0:
        return None
    return max(0.0, frechet_distance(a, b))


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _evenly_spaced(length: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(FRAMES, length)).round().astype(int)
