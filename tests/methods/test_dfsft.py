"""Diffusion forcing against its equation written out, and the published weight's reference values."""

import pytest
import torch
from tiny_models import TEXT_LENGTH, make_tiny_transformer

from fv_distill.methods import DiffusionForcingSFTMethod, DiffusionForcingSFTOptions
from fv_distill.models import CausalWanModel, WanModel
from fv_distill.models.transformers.wan_causal import CausalWanTransformer3DModel
from fv_distill.rng import SampleRng
from fv_distill.schedules import gaussian_timestep_weight, shift_sigma

FRAMES = 4


@pytest.fixture
def stock(tiny_wan):
    return WanModel(
        make_tiny_transformer(1), directory=tiny_wan, flow_shift=3.0, trainable=True, text_length=TEXT_LENGTH
    )


@pytest.fixture
def causal(tiny_wan, stock):
    network = CausalWanTransformer3DModel.from_config(stock.transformer.config)
    network.load_state_dict(stock.transformer.state_dict())
    return CausalWanModel(
        network, directory=tiny_wan, flow_shift=3.0, trainable=True, text_length=TEXT_LENGTH, chunk_size=2
    )


@pytest.fixture
def long_batch(batch):
    latents = torch.randn(2, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(5))
    return {**batch, "vae_latent": latents}


def only_term(method, batch, step=1):
    (term,) = method.losses("student", batch, SampleRng(0, step, batch["sample_index"]))
    return term


# Published values: maximum of the weight over the 1,000 shifted timesteps, and its index in the falling table.
@pytest.mark.parametrize(
    ("shift", "largest", "index"), [(1, 1.5796, 500), (3, 1.7978, 750), (5, 2.0764, 833), (8, 2.4726, 889)]
)
def test_the_weight_has_the_published_values(shift, largest, index):
    sigma = shift_sigma(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000, shift)
    weight = gaussian_timestep_weight(sigma, flow_shift=shift)
    assert weight.max().item() == pytest.approx(largest, abs=5e-5) and weight.argmax().item() == index
    assert weight.mean().item() == pytest.approx(1.0, rel=1e-5) and weight.min().item() == 0.0


def written_out(model, batch, rng, options, *, weight):
    x0 = model.normalize_latents(batch["vae_latent"])
    noise = rng.normal("noise", x0.shape[1:])
    low, high = options.min_timestep_ratio, options.max_timestep_ratio
    u = low + (high - low) * rng.uniform("sigma", (2,))
    sigma = (3 * u / (1 + 2 * u)).repeat_interleave(2, dim=1)
    level = sigma[:, None, :, None, None]
    x_t = (1 - level) * x0 + level * noise
    return x0, x_t, sigma, noise - x0, weight(sigma, u)


def bell(sigma, u):
    return gaussian_timestep_weight(sigma, flow_shift=3.0)


def bell_before_the_shift(sigma, u):
    return gaussian_timestep_weight(u.repeat_interleave(2, dim=1), flow_shift=1.0)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("gaussian", bell), ("gaussian_index", bell_before_the_shift), ("none", lambda sigma, u: torch.ones_like(sigma))],
)
def test_the_loss_is_the_written_out_one(causal, long_batch, weighting, weight):
    options = DiffusionForcingSFTOptions(
        chunk_size=2, weighting=weighting, min_timestep_ratio=0.1, max_timestep_ratio=0.9
    )
    method = DiffusionForcingSFTMethod({"student": causal}, options)
    rng = SampleRng(0, 1, [0, 1])
    _, x_t, sigma, target, factor = written_out(causal, long_batch, rng, options, weight=weight)
    assert (sigma[:, 0] != sigma[:, 2]).all() and (sigma[:, 0] == sigma[:, 1]).all()
    with torch.no_grad():
        velocity = causal.transformer(x_t, 1000 * sigma, long_batch["text_embedding"], return_dict=False)[0]
    error = (velocity - target).square().mean(dim=(1, 3, 4))
    assert only_term(method, long_batch).loss.item() == pytest.approx((factor * error).mean().item(), rel=1e-5)


@pytest.mark.parametrize("history_noise", [0.0, 0.3])
def test_teacher_forcing_shows_the_clip_itself(causal, long_batch, history_noise):
    options = DiffusionForcingSFTOptions(
        chunk_size=2, teacher_forcing=True, weighting="none", history_noise=history_noise
    )
    method = DiffusionForcingSFTMethod({"student": causal}, options)
    rng = SampleRng(0, 1, [0, 1])
    x0, x_t, sigma, target, _ = written_out(causal, long_batch, rng, options, weight=bell)
    level = history_noise * rng.uniform("history/sigma")
    spread = level.view(-1, 1, 1, 1, 1)
    history = (1 - spread) * x0 + spread * rng.normal("history/noise", x0.shape[1:])
    with torch.no_grad():
        velocity = causal.predict_velocity(
            x_t, sigma, causal.prepare_batch(long_batch).conditioning, clean_history=history, history_sigma=level
        )
        # The first chunk has no history: it is what it is alone.
        alone = causal.transformer(x_t[:, :, :2], 1000 * sigma[:, :2], long_batch["text_embedding"], return_dict=False)[
            0
        ]
    torch.testing.assert_close(velocity[:, :, :2], alone, atol=1e-5, rtol=1e-4)
    expected = (velocity - target).square().mean().item()
    assert only_term(method, long_batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_bidirectional_student_takes_levels_per_chunk_too(stock, long_batch):
    method = DiffusionForcingSFTMethod({"student": stock}, DiffusionForcingSFTOptions(chunk_size=2))
    term = only_term(method, long_batch)
    term.loss.backward()
    assert all(parameter.grad is not None for parameter in stock.transformer.parameters())


def test_mistakes_are_named(stock, causal, long_batch):
    with pytest.raises(ValueError, match="method.teacher_forcing needs a causal student"):
        DiffusionForcingSFTMethod({"student": stock}, DiffusionForcingSFTOptions(chunk_size=2, teacher_forcing=True))
    with pytest.raises(ValueError, match=r"method.chunk_size=3 cuts .* models.student.chunk_size=2"):
        DiffusionForcingSFTMethod({"student": causal})
    with pytest.raises(ValueError, match="4 latent frames do not divide into chunks of method.chunk_size=3"):
        only_term(DiffusionForcingSFTMethod({"student": stock}), long_batch)
    with pytest.raises(ValueError, match="min_timestep_ratio=0.5 must be below max_timestep_ratio=0.5"):
        DiffusionForcingSFTOptions(min_timestep_ratio=0.5, max_timestep_ratio=0.5)
    with pytest.raises(ValueError, match="history_noise=0.1 has no history to act on"):
        DiffusionForcingSFTOptions(history_noise=0.1)
