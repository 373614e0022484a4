"""A stock diffusers scheduler that visits exactly the sigmas a student was trained at.

`FlowMatchEulerDiscreteScheduler.set_timesteps(n)` spaces n values evenly from 1 to its smallest training sigma, shifts
them a second time, and stretches the result affinely so that it ends at `shift_terminal`. In z = 1 - sigma the shift of
an evenly spaced list is a Moebius map of the index k,

    z_k = c k / (w - k),        k = 0 .. n-1,

which has two free numbers. A shift s of n even steps has w = n s / (s - 1); the scheduler's own w follows from its
shift, and `shift_terminal` fixes c. So any list of this form is reached exactly by choosing those two.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from fv_distill.schedules.few_step import check_falling
from fv_distill.schedules.shift import shift_sigma

_TRAIN_TIMESTEPS = 1000
_EDM_PIPELINES = ("Cosmos2VideoToWorldPipeline", "Cosmos2TextToImagePipeline")
_TOLERANCE = 1e-5
# Beyond it the smallest training sigma is no longer near 0 and the map from shift to sigmas turns back.
_LARGEST_SHIFT = 50.0


def few_step_scheduler(sigmas: Sequence[float], *, sample_type: str = "sde") -> FlowMatchEulerDiscreteScheduler:
    """The scheduler whose `set_timesteps(len(sigmas))` gives `sigmas`, then 0.

    Args:
        sigmas: falling from 1, without the final 0.
        sample_type: "sde" noises x0 afresh in each step (`stochastic_sampling`), "ode" takes Euler steps.

    Raises:
        ValueError: for an unknown sample type, or sigmas that no setting of this scheduler reaches, which happens with
            four or more unevenly spaced steps.
    """
    if sample_type not in ("sde", "ode"):
        raise ValueError(f"sample_type={sample_type!r} is neither sde nor ode")
    check_falling(sigmas)
    shift = _solve_shift(sigmas)
    # diffusers' configuration mixin hides its attributes from type checkers.
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=_TRAIN_TIMESTEPS,
        shift=shift,
        shift_terminal=sigmas[-1] if len(sigmas) > 1 else None,
        stochastic_sampling=sample_type == "sde",
    )
    scheduler.set_timesteps(len(sigmas))
    reached = scheduler.sigmas[:-1].tolist()
    if max(abs(a - b) for a, b in zip(reached, sigmas, strict=True)) > _TOLERANCE:
        raise ValueError(
            f"no setting of FlowMatchEulerDiscreteScheduler visits the sigmas {_show(sigmas)}; the nearest visits "
            f"{_show(reached)}. Train with evenly spaced dmd_denoising_steps (warped or not), or with up to three steps"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


def check_few_step_pipeline(directory: Path) -> None:
    """Find out whether a pipeline samples at the levels that its scheduler is set to.

    Raises:
        ValueError: for pipelines that put their own noise levels in the scheduler's place.
    """
    name = json.loads((directory / "model_index.json").read_text())["_class_name"]
    if name in _EDM_PIPELINES:
        raise ValueError(
            f"{directory} is a {name}, which samples at EDM's noise levels sigma / (1 - sigma): pure noise is infinitely "
            "far there, and no stock scheduler visits a few-step student's levels. Distil Cosmos-Predict2.5 instead"
        )


def _solve_shift(sigmas: Sequence[float]) -> float:
    """The scheduler's shift that gives the second sigma its place between the first and the last."""
    if len(sigmas) < 3:
        return 1.0
    wanted = (1 - sigmas[1]) / (1 - sigmas[-1])
    low, high = 1 / _LARGEST_SHIFT, _LARGEST_SHIFT
    # The place of the second value falls as the shift grows: bisect on a logarithmic scale to double precision.
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _place_of_second(middle, len(sigmas)) > wanted else (low, middle)
    return middle


def _place_of_second(shift: float, count: int) -> float:
    smallest = shift_sigma(1 / _TRAIN_TIMESTEPS, shift)
    second, last = (shift_sigma(1 - k * (1 - smallest) / (count - 1), shift) for k in (1, count - 1))
    return (1 - second) / (1 - last)


def _show(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.5g}" for sigma in sigmas)
