import math

import pytest
import torch

from fv_distill.schedules.few_step import few_step_sigmas
from fv_distill.schedules.shift import shift_sigma, unshift_sigma
from fv_distill.schedules.timesteps import DENSITIES, density_sigma, logit_normal_sigma, mode_sigma, score_sigma


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_shift_keeps_the_ends_and_has_an_inverse(shift):
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigma(sigma, shift)
    assert shifted[0] == 0 and shifted[-1] == 1
    torch.testing.assert_close(unshift_sigma(shifted, shift), sigma)


def test_shift_by_hand():
    assert shift_sigma(0.5, 3.0) == 0.75
    assert shift_sigma(0.25, 5.0) == 0.625


# Sigmas of the published implementations' warped [1000, 750, 500, 250].
@pytest.mark.parametrize(
    ("shift", "expected"),
    [(3, (1, 0.9, 0.75, 0.5)), (5, (1, 0.9375, 0.83333, 0.625)), (8, (1, 0.96, 0.88889, 0.72727))],
)
def test_warped_steps(shift, expected):
    assert few_step_sigmas((1000, 750, 500, 250), flow_shift=shift, warp=True) == pytest.approx(expected, abs=1e-5)


def test_unwarped_steps_ignore_the_shift():
    assert few_step_sigmas((1000, 400), flow_shift=8) == (1.0, 0.4)


@pytest.mark.parametrize(
    ("steps", "message"),
    [((), "empty"), ((900, 500), "starts at 900"), ((1000, 500, 500), "fall"), ((1000, 0), "above 0")],
)
def test_bad_steps_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        few_step_sigmas(steps, flow_shift=3)


@pytest.mark.parametrize("density", DENSITIES)
def test_densities_are_monotonic_quantile_functions_into_the_unit_interval(density):
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = density_sigma(u, density)
    assert sigma.min() >= 0 and sigma.max() <= 1
    steps = sigma.diff()
    assert bool((steps >= 0).all() or (steps <= 0).all())


def test_logit_normal_has_its_median_and_quartiles():
    sigma = logit_normal_sigma(torch.tensor([0.5, 0.8413447]), mean=0.3, std=2.0)
    assert sigma.tolist() == pytest.approx([1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(-2.3))], abs=1e-5)


def test_mode_by_hand_and_flat_at_scale_zero():
    assert mode_sigma(torch.tensor(0.25), scale=0.5).item() == pytest.approx(
        1 - 0.25 - 0.5 * (math.cos(math.pi / 8) ** 2 - 0.75)
    )
    assert mode_sigma(torch.tensor(0.25), scale=0.0).item() == 0.75


def test_unknown_density_lists_the_known():
    with pytest.raises(ValueError, match="uniform, logit_normal, mode"):
        density_sigma(torch.rand(2), "beta")


def test_score_sigma_is_shifted_then_clamped():
    sigma = score_sigma(torch.tensor([0.0, 0.5, 1.0]), shift=3, minimum=0.02, maximum=0.98)
    assert sigma.tolist() == pytest.approx([0.02, 0.75, 0.98])
