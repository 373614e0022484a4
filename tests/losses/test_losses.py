import pytest
import torch

from fv_distill.losses.distribution_matching import NORMALIZER_FLOOR, dmd_direction, dmd_loss
from fv_distill.losses.flow_matching import flow_matching_loss
from fv_distill.losses.regression import x0_regression_loss

SHAPE = (2, 3, 4, 2, 2)


@pytest.fixture
def triple():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=generator) for _ in range(3))


def test_dmd_gradient_is_the_written_out_direction(triple):
    generated, real, fake = triple
    generated.requires_grad_(True)
    dmd_loss(generated, real_x0=real, fake_x0=fake).backward()
    expected = torch.empty(SHAPE)
    for b in range(SHAPE[0]):
        normalizer = (generated[b] - real[b]).abs().mean().detach()
        expected[b] = (fake[b] - real[b]) / normalizer / generated.numel()
    torch.testing.assert_close(generated.grad, expected, atol=1e-7, rtol=1e-5)


def test_dmd_batch_normalizer_is_one_number_for_all(triple):
    generated, real, fake = triple
    direction = dmd_direction(generated, real_x0=real, fake_x0=fake, normalizer="batch")
    torch.testing.assert_close(direction, (fake - real) / (generated - real).abs().mean())


def test_dmd_samples_are_independent_of_their_batch(triple):
    generated, real, fake = triple
    alone = dmd_direction(generated[:1], real_x0=real[:1], fake_x0=fake[:1])
    torch.testing.assert_close(dmd_direction(generated, real_x0=real, fake_x0=fake)[:1], alone)


def test_dmd_normalizer_is_floored(triple):
    generated, _, fake = triple
    direction = dmd_direction(generated, real_x0=generated, fake_x0=fake)
    torch.testing.assert_close(direction, (fake - generated) / NORMALIZER_FLOOR)


def test_dmd_is_computed_in_fp32_for_half_inputs(triple):
    half = [x.bfloat16() for x in triple]
    direction = dmd_direction(half[0], real_x0=half[1], fake_x0=half[2])
    exact = dmd_direction(half[0].float(), real_x0=half[1].float(), fake_x0=half[2].float())
    assert direction.dtype == torch.float32
    assert torch.equal(direction, exact)


def test_dmd_passes_no_gradient_to_the_scores(triple):
    generated, real, fake = (x.requires_grad_(True) for x in triple)
    dmd_loss(generated, real_x0=real, fake_x0=fake).backward()
    assert real.grad is None and fake.grad is None


def test_dmd_follows_the_kl_gradient_between_gaussians():
    """Against closed-form scores: KL(N(m, 1) || N(0, 1)) falls along -direction, whose sign is that of m."""
    generator = torch.Generator().manual_seed(0)
    mean, sigma = 2.0, 0.5
    generated = mean + torch.randn(4096, 1, generator=generator)
    x_t = (1 - sigma) * generated + sigma * torch.randn(4096, 1, generator=generator)
    variance = (1 - sigma) ** 2 + sigma**2

    def posterior_x0(prior_mean: float) -> torch.Tensor:
        return prior_mean + (1 - sigma) / variance * (x_t - (1 - sigma) * prior_mean)

    real, fake = posterior_x0(0.0), posterior_x0(mean)
    # E[x0 | x_t] of the two priors differ by mean * (1 - (1 - sigma)^2 / variance) everywhere.
    torch.testing.assert_close(fake - real, torch.full_like(x_t, mean * (1 - (1 - sigma) ** 2 / variance)))
    assert bool((dmd_direction(generated, real_x0=real, fake_x0=fake) > 0).all())


def test_dmd_errors(triple):
    generated, real, fake = triple
    with pytest.raises(ValueError, match="per_sample, batch"):
        dmd_direction(generated, real_x0=real, fake_x0=fake, normalizer="frame")
    with pytest.raises(ValueError, match="differ in shape"):
        dmd_direction(generated, real_x0=real[:1], fake_x0=fake)


def test_flow_matching_by_hand_and_gradient(triple):
    velocity, target, _ = triple
    velocity.requires_grad_(True)
    loss = flow_matching_loss(velocity, target)
    loss.backward()
    assert loss.item() == pytest.approx(((velocity - target) ** 2).mean().item())
    torch.testing.assert_close(velocity.grad, 2 * (velocity - target).detach() / velocity.numel())


@pytest.mark.parametrize(
    "weight", [torch.tensor([1.0, 3.0]), torch.rand(2, 4, generator=torch.Generator().manual_seed(1))]
)
def test_flow_matching_weights(triple, weight):
    velocity, target, _ = triple
    full = weight[:, None, None, None, None] if weight.ndim == 1 else weight[:, None, :, None, None]
    expected = (full * (velocity - target).square()).mean()
    torch.testing.assert_close(flow_matching_loss(velocity, target, weight=weight), expected)


def test_flow_matching_refuses_what_would_broadcast(triple):
    velocity, target, _ = triple
    with pytest.raises(ValueError, match="differ in shape"):
        flow_matching_loss(velocity, target[:1])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        flow_matching_loss(velocity, target, weight=torch.ones(3))


def test_x0_regression(triple):
    predicted, target, _ = triple
    predicted.requires_grad_(True)
    loss = x0_regression_loss(predicted, target)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * ((predicted - target) ** 2).mean().item())
    torch.testing.assert_close(predicted.grad, (predicted - target).detach() / predicted.numel())
    assert x0_regression_loss(predicted, target, scale=1.0).item() == pytest.approx(2 * loss.item())
    with pytest.raises(ValueError, match="differ in shape"):
        x0_regression_loss(predicted, target[:1])
