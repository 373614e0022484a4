"""The noise levels that a few-step student is trained at and sampled with."""

from collections.abc import Sequence
from itertools import pairwise

from .shift import shift_sigma


def few_step_sigmas(denoising_steps: Sequence[float], *, flow_shift: float, warp: bool = False) -> tuple[float, ...]:
    """The student's sigmas, from noise to data, without the final 0.

    Args:
        denoising_steps: timesteps in (0, 1000], falling, the first 1000: `(1000, 750, 500, 250)`.
        flow_shift: the model's shift, used when warping.
        warp: read the timesteps as positions in the shifted schedule: sigma = shift(timestep / 1000). Without it
            sigma = timestep / 1000.

    Raises:
        ValueError: if the list is empty, doesn't fall, leaves (0, 1000] or doesn't start at pure noise.
    """
    steps = [float(step) for step in denoising_steps]
    if not steps:
        raise ValueError("dmd_denoising_steps is empty; a student needs at least one step, for instance [1000]")
    if steps[0] != 1000:
        raise ValueError(f"dmd_denoising_steps starts at {steps[0]:g}; a student starts at pure noise, 1000")
    if any(a <= b for a, b in pairwise(steps)) or steps[-1] <= 0:
        raise ValueError(f"dmd_denoising_steps={steps} must fall strictly and stay above 0")
    sigmas = [step / 1000 for step in steps]
    return tuple(shift_sigma(sigma, flow_shift) if warp else sigma for sigma in sigmas)


def check_falling(sigmas: Sequence[float]) -> None:
    """Raise a `ValueError` unless the levels fall from 1 and stay above 0."""
    if not sigmas or sigmas[0] != 1 or any(a <= b for a, b in zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        raise ValueError(f"sigmas {list(sigmas)} must fall from 1 and stay above 0")
