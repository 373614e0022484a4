"""Few-step sampling, shared by training (backward simulation, Yin et al. 2024b, sec. 4.5) and generation."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fv_distill.models.conditioning import Conditioning
from fv_distill.schedules import flow

NoiseAtStep = Callable[[int], Tensor]


class VelocityNetwork(Protocol):
    """What sampling needs of a student: `ModelBase`, or one chunk of a `CausalModelBase`."""

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity at `x_t` `[B, C, T, H, W]` and sigma `[B]`, fp32."""


def few_step_rollout(
    student: VelocityNetwork,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    *,
    exit_step: int,
    sample_type: str,
    fresh_noise: NoiseAtStep,
    grad: bool = False,
) -> Tensor:
    """Denoise from `noise` down to step `exit_step` and return the x0 predicted there, fp32 `[B, C, T, H, W]`.

    Args:
        student: the few-step network.
        noise: where it starts, `[B, C, T, H, W]`, at sigma 1.
        conditioning: of the batch.
        sigmas: the student's levels, falling from 1, without the final 0.
        exit_step: index into `sigmas` of the last network call.
        sample_type: "sde" noises x0 afresh between two steps, "ode" with the noise that the velocity implies.
        fresh_noise: the noise for the transition out of step i; only called for "sde".
        grad: whether the last call builds a graph; those before it never do.
    """
    x_t = noise
    for step, sigma in enumerate(sigmas[: exit_step + 1]):
        level = torch.full((x_t.shape[0],), sigma, device=x_t.device)
        with torch.set_grad_enabled(grad and step == exit_step):
            velocity = student.predict_velocity(x_t, level, conditioning)
            x0 = flow.velocity_to_x0(x_t, velocity, level)
        if step < exit_step:
            eps = fresh_noise(step) if sample_type == "sde" else flow.velocity_to_noise(x_t, velocity, level)
            x_t = flow.add_noise(x0, eps, torch.full_like(level, sigmas[step + 1]))
    return x0


@torch.no_grad()
def few_step_sample(
    student: VelocityNetwork,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    *,
    sample_type: str,
    fresh_noise: NoiseAtStep,
) -> Tensor:
    """Clean latents after all of the student's steps; arguments as in `few_step_rollout`."""
    return few_step_rollout(
        student,
        noise,
        conditioning,
        sigmas,
        exit_step=len(sigmas) - 1,
        sample_type=sample_type,
        fresh_noise=fresh_noise,
    )
