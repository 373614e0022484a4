"""Few-step rollouts against every step written out."""

import pytest
import torch
from torch import nn

from fv_distill.models.conditioning import Conditioning
from fv_distill.rollouts import few_step_rollout, few_step_sample

SIGMAS = (1.0, 0.75, 0.5)
SHAPE = (2, 1, 2, 2, 2)


class Student:
    """`velocity = weight * x_t + sigma`, and a record of its calls."""

    def __init__(self):
        self.weight = nn.Parameter(torch.tensor(0.25))
        self.calls = []

    def predict_velocity(self, x_t, sigma, conditioning):
        assert sigma.shape == (len(x_t),) and sigma.dtype == torch.float32
        velocity = self.weight * x_t + sigma.view(-1, 1, 1, 1, 1)
        self.calls.append((sigma[0].item(), velocity.requires_grad, conditioning))
        return velocity


@pytest.fixture
def noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def fresh(step):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + step))


CONDITIONING = Conditioning(None, None, {})


def rollout(student, noise, exit_step, sample_type, **options):
    return few_step_rollout(
        student, noise, CONDITIONING, SIGMAS, exit_step=exit_step, sample_type=sample_type, fresh_noise=fresh, **options
    )


def written_out(noise, exit_step, sample_type, weight=0.25):
    x_t = noise
    for step in range(exit_step + 1):
        s = SIGMAS[step]
        v = weight * x_t + s
        x0 = x_t - s * v
        if step == exit_step:
            return x0
        # v = eps - x0 holds along the straight line, so the implied noise is x0 + v.
        eps = fresh(step) if sample_type == "sde" else x0 + v
        x_t = (1 - SIGMAS[step + 1]) * x0 + SIGMAS[step + 1] * eps
    raise AssertionError


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_equals_the_steps_written_out(noise, sample_type, exit_step):
    actual = rollout(Student(), noise, exit_step, sample_type)
    torch.testing.assert_close(actual, written_out(noise, exit_step, sample_type), atol=1e-5, rtol=1e-5)


def test_the_ode_step_is_an_euler_step(noise):
    """From sigma to sigma' along the velocity: x + (sigma' - sigma) v."""
    student = Student()
    x_t = noise + (0.75 - 1.0) * (0.25 * noise + 1.0)
    expected = x_t - 0.75 * (0.25 * x_t + 0.75)
    torch.testing.assert_close(rollout(student, noise, 1, "ode"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_it_stops_at_the_exit_step_and_only_there_builds_a_graph(noise, exit_step, grad):
    student = Student()
    x0 = rollout(student, noise, exit_step, "sde", grad=grad)
    assert [sigma for sigma, *_ in student.calls] == list(SIGMAS[: exit_step + 1])
    assert [has_graph for _, has_graph, _ in student.calls] == [False] * exit_step + [grad]
    assert x0.requires_grad is grad
    assert all(conditioning is CONDITIONING for *_, conditioning in student.calls)


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
def test_the_gradient_is_that_of_the_last_call_alone(noise, sample_type):
    """d x0 / d weight = -sigma x_t at the exit step, with x_t held fixed."""
    student = Student()
    rollout(student, noise, 1, sample_type, grad=True).sum().backward()
    first = written_out(noise, 0, sample_type)
    eps = fresh(0) if sample_type == "sde" else first + 0.25 * noise + 1.0
    x_t = 0.25 * first + 0.75 * eps
    torch.testing.assert_close(student.weight.grad, (-0.75 * x_t).sum(), atol=1e-4, rtol=1e-5)


def test_fresh_noise_is_only_drawn_between_sde_steps(noise):
    drawn = []

    def record(step):
        drawn.append(step)
        return fresh(step)

    for sample_type, expected in (("ode", []), ("sde", [0, 1])):
        options = {"sample_type": sample_type, "fresh_noise": record}
        few_step_rollout(Student(), noise, CONDITIONING, SIGMAS, exit_step=2, **options)
        assert drawn == expected


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
def test_a_sample_takes_every_step_and_keeps_no_graph(noise, sample_type):
    student = Student()
    sample = few_step_sample(student, noise, CONDITIONING, SIGMAS, sample_type=sample_type, fresh_noise=fresh)
    torch.testing.assert_close(sample, written_out(noise, 2, sample_type), atol=1e-5, rtol=1e-5)
    assert len(student.calls) == 3 and not sample.requires_grad


def test_a_perfect_velocity_is_sampled_exactly(noise):
    """Towards a known clip x0 the velocity is (x_t - x0) / sigma, and every rollout ends there."""
    clip = torch.full(SHAPE, 3.0)

    class Oracle:
        def predict_velocity(self, x_t, sigma, conditioning):
            return (x_t - clip) / sigma.view(-1, 1, 1, 1, 1)

    for sample_type in ("sde", "ode"):
        sample = few_step_sample(Oracle(), noise, CONDITIONING, SIGMAS, sample_type=sample_type, fresh_noise=fresh)
        torch.testing.assert_close(sample, clip, atol=1e-5, rtol=0)
