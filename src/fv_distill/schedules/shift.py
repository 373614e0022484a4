"""The time shift of flow models: more of the schedule is spent at high noise (Esser et al. 2024, eq. 23)."""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Sigma = TypeVar("Sigma", float, "Tensor")


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """`s sigma / (1 + (s - 1) sigma)`; maps [0, 1] onto itself and shift 1 is the identity."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """The inverse of `shift_sigma`, which is the shift by `1 / s`."""
    return shift_sigma(sigma, 1 / shift)
