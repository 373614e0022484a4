"""A stock diffusers scheduler that visits exactly the sigmas a student was trained at.

`FlowMatchEulerDiscreteScheduler.set_timesteps(n)` spaces n values evenly from 1 to its smallest training sigma, shifts
them a second time, and stretches the result affinely so that it ends at `shift_terminal`. In z = 1 - sigma the shift of
an evenly spaced list is a Moebius map of the index k,

    z_k = c k / (w - k),        k = 0 .. n-1,

which has two free numbers. A shift s of n even steps has w = n s / (s - 1); the scheduler's own w follows from its
shift, and `shift_terminal` fixes c. So any list of this form is reached exactly by choosing those two.
Pipelines that pass even steps themselves have them shifted once only, which is the same map with the scheduler's s.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from fv_distill.models.pretrained import read_pipeline_class
from fv_distill.schedules.few_step import check_falling
from fv_distill.schedules.shift import shift_sigma

_TRAIN_TIMESTEPS = 1000
# Those that pass `sigmas`, evenly spaced, to `set_timesteps`, instead of a number of steps.
_EVEN_PIPELINES = (
    "HunyuanVideoPipeline",
    "HunyuanVideoImageToVideoPipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "LTX2Pipeline",
)
_EDM_PIPELINES = ("Cosmos2VideoToWorldPipeline", "Cosmos2TextToImagePipeline")
_TOLERANCE = 1e-5
# Beyond it the smallest training sigma is no longer near 0 and the map from shift to sigmas turns back.
_LARGEST_SHIFT = 50.0


def few_step_scheduler(
    sigmas: Sequence[float], *, sample_type: str = "sde", even_start: bool = False
) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler whose `set_timesteps(len(sigmas))` gives `sigmas`, then 0.

    Args:
        sigmas: falling from 1, without the final 0.
        sample_type: "sde" noises x0 afresh in each step (`stochastic_sampling`), "ode" takes Euler steps.
        even_start: for pipelines that hand the scheduler even steps, 1 - k / n, which it shifts once.

    Raises:
        ValueError: for an unknown sample type, or sigmas that no setting of this scheduler reaches, which happens with
            four or more unevenly spaced steps.
    """
    if sample_type not in ("sde", "ode"):
        raise ValueError(f"sample_type={sample_type!r} is neither sde nor ode")
    check_falling(sigmas)
    shift = _solve_shift(sigmas, even_start=even_start)
    # diffusers' configuration mixin hides its attributes from type checkers.
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=_TRAIN_TIMESTEPS,
        shift=shift,
        shift_terminal=sigmas[-1] if len(sigmas) > 1 else None,
        stochastic_sampling=sample_type == "sde",
    )
    if even_start:
        scheduler.set_timesteps(sigmas=[1 - k / len(sigmas) for k in range(len(sigmas))])
    else:
        scheduler.set_timesteps(len(sigmas))
    reached = scheduler.sigmas[:-1].tolist()
    if max(abs(a - b) for a, b in zip(reached, sigmas, strict=True)) > _TOLERANCE:
        raise ValueError(
            f"no setting of FlowMatchEulerDiscreteScheduler visits the sigmas {_show(sigmas)}; the nearest visits "
            f"{_show(reached)}. Train with evenly spaced dmd_denoising_steps (warped or not), or with up to three steps"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


def few_step_scheduler_for(
    directory: Path, sigmas: Sequence[float], *, sample_type: str = "sde"
) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with which a directory's pipeline, called with `len(sigmas)` steps, visits `sigmas`.

    Args:
        directory: of the pipeline, whose class tells how it sets its scheduler.
        sigmas: see `few_step_scheduler`.
        sample_type: see `few_step_scheduler`.

    Raises:
        ValueError: as `few_step_scheduler`, and for pipelines that sample at levels of another kind.
    """
    name = read_pipeline_class(directory)
    if name in _EDM_PIPELINES:
        raise ValueError(
            f"{directory} is a {name}, which samples at EDM's noise levels sigma / (1 - sigma): pure noise is "
            "infinitely far there, and no stock scheduler visits a few-step student's levels. Distil Cosmos-Predict2.5 "
            "instead"
        )
    return few_step_scheduler(sigmas, sample_type=sample_type, even_start=name in _EVEN_PIPELINES)


def _solve_shift(sigmas: Sequence[float], *, even_start: bool) -> float:
    """The scheduler's shift that gives the second sigma its place between the first and the last."""
    if len(sigmas) < 3:
        return 1.0
    wanted = (1 - sigmas[1]) / (1 - sigmas[-1])
    place_of_second = _place_of_second_of_even if even_start else _place_of_second
    low, high = 1 / _LARGEST_SHIFT, _LARGEST_SHIFT
    # The place of the second value falls as the shift grows: bisect on a logarithmic scale to double precision.
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if place_of_second(middle, len(sigmas)) > wanted else (low, middle)
    return middle


def _place_of_second(shift: float, count: int) -> float:
    smallest = shift_sigma(1 / _TRAIN_TIMESTEPS, shift)
    second, last = (shift_sigma(1 - k * (1 - smallest) / (count - 1), shift) for k in (1, count - 1))
    return (1 - second) / (1 - last)


def _place_of_second_of_even(shift: float, count: int) -> float:
    second, last = (shift_sigma(1 - k / count, shift) for k in (1, count - 1))
    return (1 - second) / (1 - last)


def _show(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.5g}" for sigma in sigmas)
