"""Frechet distances of Gaussians whose distance is known, and the features that they are taken of."""

import numpy as np
import pytest

from fv_distill.evaluation.frechet import (
    COMPONENTS,
    MINIMUM_CLIPS,
    FrechetReference,
    clip_features,
    frechet_distance,
    principal_components,
)


def whitened(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Rows whose mean is exactly 0 and whose covariance is exactly 1."""
    rows = np.random.default_rng(seed).normal(size=(count, dimensions))
    rows -= rows.mean(axis=0)
    vectors, _, others = np.linalg.svd(rows, full_matrices=False)
    return vectors @ others * np.sqrt(count - 1)


def test_distance_of_gaussians_with_the_same_axes():
    rows = whitened(200, 3)
    scale, shift = np.array([1.0, 2.0, 0.5]), np.array([0.0, 3.0, -1.0])
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    # |shift|^2 + sum (1 - scale)^2
    assert frechet_distance(rows * scale + shift, rows) == pytest.approx(10 + 1 + 0.25)


def test_distance_does_not_depend_on_the_axes_and_the_order():
    rows, other = whitened(200, 3), whitened(150, 3, seed=1) * [1.0, 3.0, 0.2] + 1
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    expected = frechet_distance(rows @ turn, other @ turn)
    assert expected == pytest.approx(3 + 4 + 0.64)
    assert frechet_distance(other, rows) == pytest.approx(expected)


@pytest.mark.parametrize("count", [20, 400])
def test_principal_components_are_the_directions_of_largest_variance(count):
    """With fewer rows than dimensions, and with more."""
    scale = np.geomspace(10, 0.1, 60)
    rows = np.random.default_rng(0).normal(size=(count, 60)) * scale + 5
    found = principal_components(rows, 4)
    assert found.shape == (60, 4)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-8)
    _, _, expected = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs((expected[:4] @ found).diagonal()), 1, atol=1e-8)


def test_rows_that_do_not_differ_have_no_components():
    assert principal_components(np.ones((5, 8)), 3).shape == (8, 0)
    assert FrechetReference(np.ones((200, 300))).distance(np.zeros((200, 300))) is None


def test_too_few_clips_give_no_distance():
    rows = np.random.default_rng(0).normal(size=(2 * MINIMUM_CLIPS, 100))
    reference = FrechetReference(rows)
    assert reference.distance(rows[:MINIMUM_CLIPS]) > 0
    assert reference.distance(rows[: MINIMUM_CLIPS - 1]) is None
    assert FrechetReference(rows[: MINIMUM_CLIPS - 1]).distance(rows) is None
    assert reference.floor() > 0
    assert FrechetReference(rows[:-1]).floor() is None, "halves have too few"


def test_the_distance_sees_a_shift_within_the_components():
    rows = np.random.default_rng(0).normal(size=(400, COMPONENTS + 60)) * np.geomspace(10, 0.01, COMPONENTS + 60)
    shifted = rows.copy()
    shifted[:, 0] += 3
    reference = FrechetReference(rows)
    assert reference.distance(rows) == pytest.approx(0, abs=1e-6)
    assert reference.distance(shifted) == pytest.approx(9, rel=1e-3)


def test_features_are_small_frames_and_their_changes():
    frames = np.zeros((20, 32, 48, 3), dtype=np.uint8)
    frames[10:] = 255
    features = clip_features(frames)
    # 8 of 20 frames: 0, 3, 5, 8, 11, 14, 16, 19; grey -1 and 1 over the root of 3 in each of three channels.
    pixel = features.pixel.reshape(8, -1)
    assert pixel.shape[1] == 3 * 16 * 16
    np.testing.assert_allclose((pixel**2).sum(axis=1), 16 * 16, rtol=1e-5)
    assert (pixel[:4] < 0).all() and (pixel[4:] > 0).all()
    # 8 of 19 changes: 0, 3, 5, 8, 10, 13, 15, 18; the one at 9 is not among them.
    assert not features.motion.any() and features.motion.shape == features.pixel.shape
    frames[9:] = 255
    assert clip_features(frames).motion.reshape(8, -1)[3].sum() == pytest.approx(3 * 256 * 2 / 3**0.5, rel=1e-5)


def test_features_of_clips_smaller_than_the_grid():
    features = clip_features(np.full((1, 8, 12, 3), 255, dtype=np.uint8))
    assert features.pixel.shape == (3 * 8 * 12,) and features.motion.shape == (3 * 8 * 12,)
    assert not features.motion.any()
