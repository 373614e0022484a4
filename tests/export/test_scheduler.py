import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fv_distill.export import few_step_scheduler
from fv_distill.schedules import few_step_sigmas


def reached(scheduler, count):
    scheduler.set_timesteps(count)
    assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], atol=1e-3)
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("shift", [0.5, 1, 3, 5, 8, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("warp", [True, False])
def test_evenly_spaced_steps_are_visited_exactly(shift, count, warp, tmp_path):
    steps = [1000 * (1 - index / count) for index in range(count)]
    sigmas = few_step_sigmas(steps, flow_shift=shift, warp=warp)
    scheduler = few_step_scheduler(sigmas)
    assert reached(scheduler, count) == pytest.approx([*sigmas, 0], abs=1e-6)
    scheduler.save_pretrained(tmp_path)
    assert reached(FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path), count) == pytest.approx(
        [*sigmas, 0], abs=1e-6
    )


@pytest.mark.parametrize("sigmas", [(1.0, 0.3), (1.0, 0.6, 0.5), (1.0, 0.8, 0.2)])
def test_short_uneven_lists_are_visited_too(sigmas):
    assert reached(few_step_scheduler(sigmas), len(sigmas)) == pytest.approx([*sigmas, 0], abs=1e-6)


def test_the_naive_scheduler_would_not_do():
    """What this module is for: shifting the list once is not what set_timesteps does."""
    naive = reached(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    assert naive != pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=0.02)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ((1.0, 0.9, 0.5, 0.1), "no setting of FlowMatchEulerDiscreteScheduler visits the sigmas 1, 0.9, 0.5, 0.1"),
        ((0.9, 0.5), "must fall from 1"),
        ((1.0, 0.5, 0.5), "must fall from 1"),
        ((), "must fall from 1"),
    ],
)
def test_unreachable_lists_are_refused(sigmas, message):
    with pytest.raises(ValueError, match=message):
        few_step_scheduler(sigmas)


def test_sample_type():
    assert few_step_scheduler((1.0,), sample_type="sde").config.stochastic_sampling
    assert not few_step_scheduler((1.0,), sample_type="ode").config.stochastic_sampling
    with pytest.raises(ValueError, match="neither sde nor ode"):
        few_step_scheduler((1.0,), sample_type="heun")
