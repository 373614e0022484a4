"""Every measure on clips whose figure can be written down."""

import math

import numpy as np
import pytest
import torch

from fv_distill.evaluation import metrics


def grey(values) -> np.ndarray:
    """Frames `[F, H, W, 3]` of floats from grey ones `[F, H, W]`."""
    return np.repeat(np.asarray(values, dtype=np.float32)[..., None], 3, axis=-1)


def moving_square(steps: int = 5, *, size: int = 12, side: int = 4) -> np.ndarray:
    """A white square that goes one pixel to the right a frame."""
    frames = np.zeros((steps, size, size))
    for step in range(steps):
        frames[step, 4 : 4 + side, step : step + side] = 1
    return grey(frames)


def random_clip(seed: int, shape=(6, 12, 12)) -> np.ndarray:
    return grey(np.random.default_rng(seed).random(shape))


def test_integers_are_fractions_of_255():
    frames = np.full((2, 4, 4, 3), 51, dtype=np.uint8)
    assert metrics.brightness(frames) == pytest.approx(0.2)
    assert torch.equal(metrics.to_unit(frames), torch.full((2, 4, 4, 3), 0.2))


def test_luma_weighs_the_channels():
    red = np.zeros((1, 2, 2, 3), dtype=np.float32)
    red[..., 0] = 1
    assert metrics.brightness(red) == pytest.approx(0.299)
    assert metrics.brightness(grey(np.ones((1, 2, 2)))) == pytest.approx(1.0)


def test_mse_and_psnr():
    a, b = torch.zeros(2, 3), torch.full((2, 3), 0.1)
    assert metrics.mse(a, b) == pytest.approx(0.01)
    assert metrics.psnr(a, b, peak=1.0) == pytest.approx(20.0)
    assert metrics.psnr(a, b, peak=10.0) == pytest.approx(40.0)
    assert metrics.psnr(a, a, peak=1.0) == 100.0 == metrics.psnr(a, a + 1e-9, peak=1.0)


def test_ssim_of_equal_of_constant_and_of_inverted_images():
    images = torch.rand(3, 16, 20, generator=torch.Generator().manual_seed(0))
    assert metrics.ssim(images, images, peak=1.0) == pytest.approx(1.0)
    # Constant images: only the term of the means is left.
    a, b, c1 = 0.2, 0.6, 0.01**2
    found = metrics.ssim(torch.full((1, 16, 16), a), torch.full((1, 16, 16), b), peak=1.0)
    assert found == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    # Around the same mean, an image and its mirror image in value: the covariance is minus the variance.
    assert metrics.ssim(images, 1 - images, peak=1.0) < -0.8


def test_ssim_of_one_window_is_the_written_out_formula():
    a, b = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    line = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    weights = line[:, None] * line / (line.sum() ** 2)
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    peak = 2.0
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    expected = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    expected /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    assert metrics.ssim(a[None], b[None], peak=peak) == pytest.approx(float(expected))


def test_ssim_takes_images_smaller_than_its_window():
    images = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(2))
    assert metrics.ssim(images, images, peak=1.0) == pytest.approx(1.0)
    assert metrics.ssim(images, images.flip(1), peak=1.0) < 0.9


def test_comparisons_of_clips_and_of_latents():
    clip = moving_square()
    assert metrics.compare_frames(clip, clip) == {"pixel_mse": 0.0, "psnr": 100.0, "ssim": pytest.approx(1.0)}
    assert metrics.compare_frames(clip, 1 - clip)["pixel_mse"] == 1.0
    latents = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 5
    span = float(latents.max() - latents.min())
    found = metrics.compare_latents(latents + 0.1 * span, latents)
    assert found["latent_mse"] == pytest.approx((0.1 * span) ** 2)
    assert found["latent_psnr"] == pytest.approx(20.0)
    assert metrics.compare_latents(latents, latents)["latent_ssim"] == pytest.approx(1.0)


def test_motion():
    assert metrics.motion(grey(np.full((4, 6, 6), 0.3))) == 0
    assert metrics.motion(grey(np.ones((1, 6, 6)))) == 0
    # A square of 4 pixels' height leaves 4 pixels and enters 4 others, of 144.
    assert metrics.motion(moving_square()) == pytest.approx(8 / 144)
    assert metrics.motion(grey(np.arange(5)[:, None, None] * np.full((5, 6, 6), 0.1))) == pytest.approx(0.1)


def test_flicker():
    alternating = grey(np.arange(7)[:, None, None] % 2 * np.ones((7, 4, 4)))
    ramp = grey(np.arange(5)[:, None, None] * np.full((5, 4, 4), 0.25))
    assert metrics.flicker(alternating) == pytest.approx(1.0)
    assert metrics.flicker(ramp) == pytest.approx(0.0)
    assert metrics.flicker(grey(np.full((5, 4, 4), 0.5))) == 0
    assert metrics.flicker(alternating[:2]) == 0
    assert metrics.flicker(random_clip(0, (40, 32, 32))) == pytest.approx(0.75, abs=0.01)
    # Every pixel changes at most once in three frames, so that one change is two second differences.
    wide = moving_square(5, size=16, side=8)
    assert metrics.flicker(wide) == pytest.approx((2 * 16) / 16 / 4)


def test_brightness_and_contrast():
    halves = np.zeros((3, 4, 4))
    halves[:, :2] = 1
    assert metrics.brightness(grey(halves)) == pytest.approx(0.5)
    assert metrics.contrast(grey(halves)) == pytest.approx(0.5)
    # Within a frame, not between frames.
    assert metrics.contrast(grey(np.arange(3)[:, None, None] * np.full((3, 4, 4), 0.5))) == pytest.approx(0, abs=1e-6)


def test_diversity_is_the_root_mean_square_over_pairs():
    clips = [random_clip(seed) for seed in range(4)]
    squares = [((a - b) ** 2).mean() for index, a in enumerate(clips) for b in clips[:index]]
    assert metrics.diversity(clips) == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-6)
    assert metrics.diversity([clips[0], clips[0].copy()]) == 0
    black, white = grey(np.zeros((2, 4, 4))), grey(np.ones((2, 4, 4)))
    assert metrics.diversity([black, white]) == pytest.approx(1.0)
    assert metrics.diversity(iter(clips[:1])) is None


def test_describe_clip_has_them_all():
    clip = moving_square()
    assert metrics.describe_clip(clip) == {
        "motion": metrics.motion(clip),
        "flicker": metrics.flicker(clip),
        "brightness": metrics.brightness(clip),
        "contrast": metrics.contrast(clip),
    }
