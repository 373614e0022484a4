"""What is measured on clips: pure functions of arrays, with their definitions. None needs a downloaded network.

Frames are `[F, H, W, 3]`, uint8 or floats in [0, 1]; figures are in units of the full range, black 0 and white 1.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

# What equal clips get instead of infinity, which JSON has no number for.
MAX_PSNR = 100.0
# Wang et al. 2004, "Image quality assessment", sec. III-B and IV.
_SSIM_WINDOW = 11
_SSIM_DEVIATION = 1.5
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
# ITU-R BT.601.
_LUMA = (0.299, 0.587, 0.114)


def to_unit(frames: np.ndarray) -> Tensor:
    """Frames `[F, H, W, 3]` as fp32 in [0, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(frames))
    return values.float() / 255 if frames.dtype == np.uint8 else values.float()


def to_luma(frames: np.ndarray) -> Tensor:
    """The brightness of frames, fp32 `[F, H, W]` in [0, 1]."""
    return to_unit(frames) @ torch.tensor(_LUMA)


# Of two clips


def mse(a: Tensor, b: Tensor) -> float:
    """The mean squared difference of two tensors of one shape."""
    return float((a.double() - b.double()).square().mean())


def psnr(a: Tensor, b: Tensor, *, peak: float) -> float:
    """`10 log10(peak^2 / mse)` in dB; at most 100, which equal tensors get."""
    error = mse(a, b)
    return MAX_PSNR if error == 0 else min(MAX_PSNR, float(10 * np.log10(peak**2 / error)))


def ssim(a: Tensor, b: Tensor, *, peak: float) -> float:
    """Structural similarity, the mean over images `[N, H, W]` (Wang et al. 2004, eq. 13, Gaussian window).

    The window is 11 pixels wide, for smaller images as many as they have; places where it would stand out are left out.

    Args:
        a: images.
        b: images of the same shape.
        peak: the range of values.
    """
    window = _gaussian(min(_SSIM_WINDOW, *a.shape[-2:]))
    first, second = a.double()[:, None], b.double()[:, None]

    def blur(images: Tensor) -> Tensor:
        return conv2d(conv2d(images, window[None, None, :, None]), window[None, None, None, :])

    mean_a, mean_b = blur(first), blur(second)
    variance_a = blur(first * first) - mean_a**2
    variance_b = blur(second * second) - mean_b**2
    covariance = blur(first * second) - mean_a * mean_b
    c1, c2 = (_SSIM_K1 * peak) ** 2, (_SSIM_K2 * peak) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean())


def compare_frames(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """`pixel_mse` and `psnr` of the colours, `ssim` of the luma of two clips."""
    first, second = to_unit(a), to_unit(b)
    return {
        "pixel_mse": mse(first, second),
        "psnr": psnr(first, second, peak=1.0),
        "ssim": ssim(to_luma(a), to_luma(b), peak=1.0),
    }


def compare_latents(a: Tensor, b: Tensor) -> dict[str, float]:
    """The same of latents `[C, T, H, W]`; the peak is the range of `b`'s values, an image is a channel of a frame."""
    peak = float(b.max() - b.min()) or 1.0
    return {
        "latent_mse": mse(a, b),
        "latent_psnr": psnr(a, b, peak=peak),
        "latent_ssim": ssim(a.flatten(0, 1), b.flatten(0, 1), peak=peak),
    }


# Of one clip


def motion(frames: np.ndarray) -> float:
    """The mean absolute difference of successive frames; 0 for a single frame."""
    return float(to_unit(frames).diff(dim=0).abs().mean()) if len(frames) > 1 else 0.0


def flicker(frames: np.ndarray) -> float:
    """The energy of second differences in time relative to that of first ones, over 4.

    1 for frames that alternate, 3/4 for frames that have nothing to do with each other, 0 for those that change evenly,
    for a still clip, and for less than three frames.
    """
    steps = to_unit(frames).double().diff(dim=0)
    if len(steps) < 2 or not steps.any():
        return 0.0
    return float(steps.diff(dim=0).square().mean() / steps.square().mean() / 4)


def brightness(frames: np.ndarray) -> float:
    """The mean luma."""
    return float(to_luma(frames).mean())


def contrast(frames: np.ndarray) -> float:
    """The standard deviation of the luma within a frame, the mean over frames."""
    return float(to_luma(frames).flatten(1).std(dim=1, correction=0).mean())


def describe_clip(frames: np.ndarray) -> dict[str, float]:
    """All measures of one clip."""
    return {measure.__name__: measure(frames) for measure in (motion, flicker, brightness, contrast)}


# Of the clips of one prompt


def diversity(clips: Iterable[np.ndarray]) -> float | None:
    """The root of the mean squared difference over all pairs of clips; None for less than two.

    Over N clips that mean is twice the variance, so that the clips need not be held together.
    """
    count = 0
    for clip in clips:
        values = to_unit(clip).double()
        if count == 0:
            first, total, squares = values, torch.zeros_like(values), torch.zeros_like(values)
        # Relative to the first clip, where the difference of squares is exact if the clips are equal.
        total += values - first
        squares += (values - first).square()
        count += 1
    if count < 2:
        return None
    variance = (squares - total.square() / count) / (count - 1)
    return float(np.sqrt(2 * variance.mean().clamp(min=0)))


def _gaussian(width: int) -> Tensor:
    places = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    weights = torch.exp(-places.square() / (2 * _SSIM_DEVIATION**2))
    return weights / weights.sum()
