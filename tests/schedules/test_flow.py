import pytest
import torch

from fv_distill.schedules import flow


@pytest.fixture
def path():
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 4, 5, 6, generator=generator) for _ in range(2))
    return x0, eps


@pytest.mark.parametrize(
    "sigma", [torch.tensor([0.2, 0.9]), torch.rand(2, 4, generator=torch.Generator().manual_seed(1))]
)
def test_velocity_recovers_data_and_noise(path, sigma):
    x0, eps = path
    x_t, v = flow.add_noise(x0, eps, sigma), flow.velocity_target(x0, eps)
    torch.testing.assert_close(flow.velocity_to_x0(x_t, v, sigma), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow.velocity_to_noise(x_t, v, sigma), eps, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow.x0_to_velocity(x_t, x0, sigma), v, atol=1e-4, rtol=0)


def test_add_noise_by_hand():
    x_t = flow.add_noise(torch.full((1, 1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1, 1), -1.0), torch.tensor([0.25]))
    assert x_t.item() == pytest.approx(0.75 * 2 - 0.25)


def test_velocity_is_the_derivative_along_the_path(path):
    x0, eps = (x.double() for x in path)
    step = 1e-3
    above, below = (flow.add_noise(x0, eps, torch.full((2,), 0.5 + d)) for d in (step, -step))
    torch.testing.assert_close((above - below) / (2 * step), flow.velocity_target(x0, eps), atol=1e-3, rtol=0)


def test_sigma_per_frame_touches_only_its_frame(path):
    x0, eps = path
    sigma = torch.zeros(2, 4)
    sigma[0, 2] = 1.0
    x_t = flow.add_noise(x0, eps, sigma)
    assert torch.equal(x_t[0, :, 2], eps[0, :, 2])
    assert torch.equal(x_t[1], x0[1]) and torch.equal(x_t[0, :, :2], x0[0, :, :2])


def test_one_sigma_is_that_of_every_frame(path):
    x0, _ = path
    expected = torch.tensor([[0.2] * 4, [0.9] * 4])
    for sigma in (torch.tensor([0.2, 0.9]), expected):
        assert torch.equal(flow.per_frame(sigma, x0), expected)


def test_wrong_sigma_shape_names_both_shapes(path):
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3, 4, 5, 6\)"):
        flow.add_noise(*path, torch.rand(3))


def test_velocity_at_sigma_zero_is_refused(path):
    with pytest.raises(ValueError, match="undefined at sigma 0"):
        flow.x0_to_velocity(*path, torch.tensor([0.5, 0.0]))


def test_half_precision_inputs_are_computed_in_fp32(path):
    x0, eps = (x.bfloat16() for x in path)
    assert flow.add_noise(x0, eps, torch.tensor([0.3, 0.7])).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guide(path, scale):
    cond, uncond = path
    torch.testing.assert_close(flow.guide(cond, uncond, scale), uncond + scale * (cond - uncond), atol=1e-5, rtol=1e-5)
