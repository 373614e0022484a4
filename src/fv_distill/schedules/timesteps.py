"""Densities of the training sigma, each as its quantile function: a uniform draw in, a sigma out.

Being functions of a uniform number they hold no randomness of their own, and stratified or shared draws come for free.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .shift import shift_sigma

DENSITIES = ("uniform", "logit_normal", "mode")

# A uniform draw of exactly 0 or 1 has no finite normal quantile.
_EDGE = 1e-6

_NUM_TIMESTEPS = 1000


def uniform_sigma(u: Tensor) -> Tensor:
    """sigma = u."""
    return u


def logit_normal_sigma(u: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigma = sigmoid(mean + std z) with z the normal quantile of u (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(_EDGE, 1 - _EDGE)))


def mode_sigma(u: Tensor, *, scale: float = 1.29) -> Tensor:
    """sigma = 1 - u - scale (cos^2(pi u / 2) - 1 + u), heavy-tailed around its mode (Esser et al. 2024, eq. 20).

    The map is monotonic for scale in [-1, 2 / (pi - 2)].
    """
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def density_sigma(
    u: Tensor, density: str, *, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> Tensor:
    """The sigma at uniform number `u` (any shape) of the density called `density`.

    Raises:
        ValueError: if the density is not one of `DENSITIES`.
    """
    if density == "uniform":
        return uniform_sigma(u)
    if density == "logit_normal":
        return logit_normal_sigma(u, mean=logit_mean, std=logit_std)
    if density == "mode":
        return mode_sigma(u, scale=mode_scale)
    raise ValueError(f"unknown sigma density {density!r}; choose one of {', '.join(DENSITIES)}")


def within_range(u: Tensor, quantile: Callable[[Tensor], Tensor], sigma_range: tuple[float, float]) -> Tensor:
    """Sigmas of the density whose quantile function is `quantile`, given that they lie in `sigma_range`.

    This is the share of a whole model's training that falls to an expert for some of its noise levels.

    Args:
        u: uniform draws in [0, 1).
        quantile: monotonic, uniform draw to sigma.
        sigma_range: (0, 1) leaves the density as it is, to the bit.
    """
    if sigma_range == (0.0, 1.0):
        return quantile(u)
    low, high = sorted(_inverse(quantile, sigma) for sigma in sigma_range)
    # Rounding at the edges must not hand an expert another one's level.
    return quantile(low + (high - low) * u).clamp(*sigma_range)


def _inverse(quantile: Callable[[Tensor], Tensor], sigma: float) -> float:
    """The uniform number at which a monotonic quantile function is `sigma`, or the end of [0, 1] nearest to it."""

    def at(u: float) -> float:
        return quantile(torch.tensor(u, dtype=torch.float64)).item()

    rises = at(1.0) >= at(0.0)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (at(middle) < sigma) == rises else (low, middle)
    return (low + high) / 2


def score_sigma(u: Tensor, *, shift: float, minimum: float = 0.02, maximum: float = 0.98) -> Tensor:
    """The sigma at which teacher and critic score a sample: `u` shifted, then clamped to [minimum, maximum]."""
    return shift_sigma(u.float(), shift).clamp(minimum, maximum)


def gaussian_timestep_weight(sigma: Tensor, *, flow_shift: float) -> Tensor:
    """Self-Forcing's training weight: a bell over the timestep t = 1000 sigma, of mean 1 over the training schedule.

    `exp(-2 ((t - N/2) / N)^2)` minus its minimum, scaled to sum to N, both over the N = 1000 shifted timesteps (Huang
    et al. 2025, published code). The constants come from that table whatever the student's own levels are: over a few
    levels alone the minimum may be all there is.

    Args:
        sigma: levels of any shape, in [0, 1].
        flow_shift: the shift of the schedule that the table is made of.
    """
    table = _bell(shift_sigma(torch.arange(_NUM_TIMESTEPS, 0, -1, dtype=torch.float64) / _NUM_TIMESTEPS, flow_shift))
    scale = _NUM_TIMESTEPS / (table - table.min()).sum()
    return ((_bell(sigma.double()) - table.min()) * scale).clamp(min=0).float()


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5).square())
