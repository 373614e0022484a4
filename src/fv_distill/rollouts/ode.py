"""A teacher's deterministic sampling paths, which knowledge distillation learns from."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fv_distill.models.base import ModelBase
from fv_distill.models.conditioning import Conditioning
from fv_distill.schedules import flow
from fv_distill.schedules.shift import shift_sigma

# The columns of the data schema that hold a path: its normalised states [S, C, T, H, W], and 1000 sigma of each.
STATES = "trajectory_latents"
TIMESTEPS = "trajectory_timesteps"


def trajectory_sigmas(wanted: Sequence[float], *, num_steps: int, flow_shift: float) -> tuple[float, ...]:
    """The solver's levels: `num_steps` even steps in the shifted schedule, from 1 to 0, that visit `wanted` exactly.

    The inner levels next to the wanted ones are moved onto them, so that the number of steps stays what it is and a
    student's levels need no rounding to the solver's.

    Args:
        wanted: levels to visit, falling, from 1 to 0 inclusive.
        num_steps: network calls of the solver (twice as many with guidance).
        flow_shift: the teacher's.

    Raises:
        ValueError: if there are fewer steps than wanted transitions.
    """
    inner = [sigma for sigma in wanted if 0 < sigma < 1]
    if num_steps <= len(inner):
        raise ValueError(
            f"method.teacher_inference_steps={num_steps} can't visit {len(inner)} levels between noise and data; it "
            f"must be at least {len(inner) + 1}"
        )
    grid = [shift_sigma(1 - step / num_steps, flow_shift) for step in range(1, num_steps)]
    for sigma in inner:
        free = [index for index, value in enumerate(grid) if value not in inner]
        grid[min(free, key=lambda index: abs(grid[index] - sigma))] = sigma
    return (1.0, *sorted(grid, reverse=True), 0.0)


@torch.no_grad()
def ode_trajectory(
    teacher: ModelBase,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    *,
    keep: Sequence[float],
    unconditional: Conditioning | None,
    guidance_scale: float,
) -> Tensor:
    """Euler steps along the probability-flow ODE `dx / dsigma = v`; the states at some of the levels.

    Args:
        teacher: a many-step network.
        noise: the state at sigma 1, `[B, C, T, H, W]`.
        conditioning: of the batch.
        sigmas: the solver's levels, falling from 1 to 0.
        keep: the levels, among `sigmas`, whose states are returned, in this order.
        unconditional: of guidance's other pass; not needed at scale 1.
        guidance_scale: `uncond + scale (cond - uncond)`.

    Returns:
        fp32 `[B, len(keep), C, T, H, W]`.
    """
    x_t = noise.float()
    states = {sigmas[0]: x_t}
    for sigma, following in pairwise(sigmas):
        level = torch.full((x_t.shape[0],), sigma, device=x_t.device)
        x0 = teacher.predict_x0_guided(x_t, level, conditioning, unconditional, guidance_scale)
        x_t = x_t + (following - sigma) * flow.x0_to_velocity(x_t, x0, level)
        states[following] = x_t
    return torch.stack([states[sigma] for sigma in keep], dim=1)
