"""Teacher paths against diffusers' Euler steps, and the levels they visit."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import TEXT_DIM, TEXT_LENGTH, make_tiny_transformer

from fv_distill.models import Conditioning, WanModel
from fv_distill.rollouts import ode_trajectory, trajectory_sigmas

WANTED = (1.0, 0.937, 0.833, 0.624, 0.0)


@pytest.mark.parametrize("num_steps", [4, 5, 48])
def test_the_levels_are_even_shifted_steps_moved_onto_the_wanted_ones(num_steps):
    levels = trajectory_sigmas(WANTED, num_steps=num_steps, flow_shift=5.0)
    assert len(levels) == num_steps + 1 and set(WANTED) <= set(levels)
    assert all(a > b for a, b in pairwise(levels))
    even = [5 * u / (1 + 4 * u) for u in (1 - step / num_steps for step in range(num_steps + 1))]
    assert sum(abs(a - b) > 1e-12 for a, b in zip(levels, even, strict=True)) == 3


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match=r"teacher_inference_steps=3 can't visit 3 levels .* at least 4"):
        trajectory_sigmas(WANTED, num_steps=3, flow_shift=5.0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_path_equals_diffusers_euler_steps(tiny_wan, scale):
    teacher = WanModel(make_tiny_transformer(4), directory=tiny_wan, flow_shift=3.0, text_length=TEXT_LENGTH)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
    text, negative = torch.randn(2, 2, TEXT_LENGTH, TEXT_DIM, generator=generator)
    sigmas = (1.0, 0.9, 0.6, 0.3, 0.0)
    states = ode_trajectory(
        teacher, noise, Conditioning(text, None), sigmas,
        keep=(1.0, 0.6, 0.0), unconditional=Conditioning(negative, None), guidance_scale=scale,
    )  # fmt: skip

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(sigmas[:-1]))
    sample, expected = noise, [noise]
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            cond, uncond = (
                teacher.transformer(sample, timestep.expand(2), t, return_dict=False)[0] for t in (text, negative)
            )
        sample = scheduler.step(uncond + scale * (cond - uncond), timestep, sample, return_dict=False)[0]
        expected.append(sample)
    torch.testing.assert_close(
        states, torch.stack([expected[0], expected[2], expected[4]], dim=1), atol=1e-5, rtol=1e-4
    )
