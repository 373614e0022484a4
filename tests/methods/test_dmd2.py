"""DMD2 against its equations written out with bare network calls."""

import pytest
import torch
from tiny_models import TEXT_LENGTH, make_tiny_transformer

from fv_distill.methods import DMD2Method, DMD2Options
from fv_distill.models import WanModel
from fv_distill.rng import SampleRng

SIGMAS = (1.0, 0.9, 0.75, 0.5)


def make_model(tiny_wan, seed, *, trainable):
    return WanModel(
        make_tiny_transformer(seed),
        directory=tiny_wan,
        flow_shift=3.0,
        trainable=trainable,
        negative_prompt="bad",
        text_length=TEXT_LENGTH,
    )


@pytest.fixture
def models(tiny_wan):
    return {
        "student": make_model(tiny_wan, 1, trainable=True),
        "teacher": make_model(tiny_wan, 2, trainable=False),
        "critic": make_model(tiny_wan, 3, trainable=True),
    }


def make_method(models, **options):
    method = DMD2Method(models, DMD2Options(**options))
    method.encode_prompts()
    return method


def only_term(method, role, batch, step=1):
    (term,) = method.losses(role, batch, SampleRng(0, step, batch["sample_index"]))
    return term


def call(model, x_t, sigma, text):
    return model.transformer(x_t, 1000 * sigma, text, return_dict=False)[0]


def expand(sigma):
    return sigma.view(-1, 1, 1, 1, 1)


def backward_simulation(student, batch, rng, exit_step, role):
    """The student's x0 at `exit_step`, every step written out."""
    shape, text = batch["vae_latent"].shape[1:], batch["text_embedding"]
    x_t = rng.normal(f"{role}/rollout", shape)
    for index in range(exit_step + 1):
        sigma = torch.full((2,), SIGMAS[index])
        x0 = x_t - expand(sigma) * call(student, x_t, sigma, text)
        if index < exit_step:
            x0 = x0.detach()
            x_t = (1 - SIGMAS[index + 1]) * x0 + SIGMAS[index + 1] * rng.normal(f"{role}/rollout/{index}", shape)
    return x0


@pytest.mark.parametrize("step", range(1, 9))
def test_student_gradients_equal_the_written_out_equation(models, batch, step):
    method = make_method(models, real_score_guidance_scale=3.0)
    only_term(method, "student", batch, step).loss.backward()
    actual = [parameter.grad.clone() for parameter in models["student"].transformer.parameters()]
    models["student"].transformer.zero_grad()

    rng = SampleRng(0, step, [0, 1])
    exit_step = rng.shared_integer("student/exit", 4)
    x0 = backward_simulation(models["student"], batch, rng, exit_step, "student")
    with torch.no_grad():
        u = rng.uniform("score/sigma")
        sigma = (3 * u / (1 + 2 * u)).clamp(0.02, 0.98)
        x_t = (1 - expand(sigma)) * x0 + expand(sigma) * rng.normal("score/noise", x0.shape[1:])
        text, negative = batch["text_embedding"], models["student"].encode_prompts(["bad"]).text.expand(2, -1, -1)
        cond, uncond = (call(models["teacher"], x_t, sigma, t) for t in (text, negative))
        real = x_t - expand(sigma) * (uncond + 3.0 * (cond - uncond))
        fake = x_t - expand(sigma) * call(models["critic"], x_t, sigma, text)
        direction = (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
    (x0 * direction / x0.numel()).sum().backward()
    for parameter, gradient in zip(models["student"].transformer.parameters(), actual, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_every_exit_step_is_drawn():
    assert {SampleRng(0, step, [0]).shared_integer("student/exit", 4) for step in range(1, 9)} == {0, 1, 2, 3}


def test_critic_loss_equals_the_written_out_equation(models, batch):
    method = make_method(models)
    term = only_term(method, "critic", batch, step=3)
    rng = SampleRng(0, 3, [0, 1])
    with torch.no_grad():
        x0 = backward_simulation(models["student"], batch, rng, rng.shared_integer("critic/exit", 4), "critic")
        u = rng.uniform("critic/sigma")
        sigma = (3 * u / (1 + 2 * u)).clamp(0.02, 0.98)
        noise = rng.normal("critic/noise", x0.shape[1:])
        x_t = (1 - expand(sigma)) * x0 + expand(sigma) * noise
        expected = (call(models["critic"], x_t, sigma, batch["text_embedding"]) - (noise - x0)).square().mean()
    assert term.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    term.loss.backward()
    assert all(parameter.grad is not None for parameter in models["critic"].transformer.parameters())
    assert all(parameter.grad is None for parameter in models["student"].transformer.parameters())


def test_data_latent_mode_denoises_the_clip(models, batch):
    method = make_method(models, rollout_mode="data_latent", real_score_guidance_scale=1.0)
    term = only_term(method, "critic", batch, step=2)
    rng = SampleRng(0, 2, [0, 1])
    with torch.no_grad():
        clean = models["student"].normalize_latents(batch["vae_latent"])
        start = torch.tensor(SIGMAS)[(4 * rng.uniform("critic/exit")).long()]
        x_t = (1 - expand(start)) * clean + expand(start) * rng.normal("critic/rollout", clean.shape[1:])
        x0 = x_t - expand(start) * call(models["student"], x_t, start, batch["text_embedding"])
        u = rng.uniform("critic/sigma")
        sigma = (3 * u / (1 + 2 * u)).clamp(0.02, 0.98)
        noise = rng.normal("critic/noise", x0.shape[1:])
        noised = (1 - expand(sigma)) * x0 + expand(sigma) * noise
        expected = (call(models["critic"], noised, sigma, batch["text_embedding"]) - (noise - x0)).square().mean()
    assert term.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_updates_start_with_the_kth_step(models):
    method = make_method(models, generator_update_interval=3)
    assert [method.updates(step) for step in range(1, 7)] == [
        ("critic",), ("critic",), ("student", "critic"), ("critic",), ("critic",), ("student", "critic"),
    ]  # fmt: skip


def count_calls(models):
    calls = dict.fromkeys(models, 0)
    for name, model in models.items():
        model.transformer.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    return calls


@pytest.mark.parametrize("reuse", [True, False])
def test_reuse_of_the_rollout(models, batch, reuse):
    method = make_method(models, reuse_rollout=reuse, dmd_denoising_steps=[1000], real_score_guidance_scale=2.0)
    calls = count_calls(models)
    only_term(method, "student", batch)
    assert calls == {"student": 1, "teacher": 2, "critic": 1}
    only_term(method, "critic", batch)
    assert calls == {"student": 1 if reuse else 2, "teacher": 2, "critic": 2}
    only_term(method, "critic", batch, step=2)
    assert calls["student"] == (2 if reuse else 3)


def test_reused_rollout_is_the_students_own(models, batch):
    method = make_method(models, dmd_denoising_steps=[1000])
    only_term(method, "student", batch)
    term = only_term(method, "critic", batch)
    rng = SampleRng(0, 1, [0, 1])
    with torch.no_grad():
        noise = rng.normal("student/rollout", batch["vae_latent"].shape[1:])
        x0 = noise - call(models["student"], noise, torch.ones(2), batch["text_embedding"])
        u = rng.uniform("critic/sigma")
        sigma = (3 * u / (1 + 2 * u)).clamp(0.02, 0.98)
        eps = rng.normal("critic/noise", x0.shape[1:])
        x_t = (1 - expand(sigma)) * x0 + expand(sigma) * eps
        expected = (call(models["critic"], x_t, sigma, batch["text_embedding"]) - (eps - x0)).square().mean()
    assert term.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_samples_do_not_depend_on_the_split_of_their_batch(models, batch):
    method = make_method(models, reuse_rollout=False)
    whole = only_term(method, "student", batch, step=2).loss
    halves = []
    for index in range(2):
        half = {key: value[index : index + 1] for key, value in batch.items() if key != "num_bad_rows"}
        halves.append(only_term(method, "student", half, step=2).loss)
    assert whole.item() == pytest.approx(torch.stack(halves).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"dmd_normalizer": "batch"},
        {"score_sigma": "per_batch"},
        {"min_score_sigma": 0.6, "max_score_sigma": 0.61},
        {"score_flow_shift": 9.0},
        {"real_score_guidance_scale": 1.0},
        {"cfg_uncond": {"text": "zero"}},
        {"student_sample_type": "ode"},
        {"warp_denoising_step": False},
    ],
)
def test_every_option_changes_the_loss(models, batch, options):
    base = make_method(models, reuse_rollout=False)
    changed = make_method(models, reuse_rollout=False, **options)
    steps = [step for step in range(1, 9) if SampleRng(0, step, [0]).shared_integer("student/exit", 4) == 2][:1]
    losses = [only_term(method, "student", batch, step).loss.item() for method in (base, changed) for step in steps]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_keeping_the_text_makes_guidance_vanish(models, batch):
    kept = make_method(models, cfg_uncond={"text": "keep"}, real_score_guidance_scale=5.0)
    plain = make_method(models, real_score_guidance_scale=1.0)
    losses = [only_term(method, "student", batch).loss.item() for method in (kept, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_policy_for_a_channel_the_data_lacks(models, batch):
    with pytest.raises(ValueError, match="method.cfg_uncond.image is set but the data has none of clip_feature"):
        only_term(make_method(models, cfg_uncond={"image": "zero"}), "student", batch)
    only_term(make_method(models, cfg_uncond={"image": "zero", "on_missing": "ignore"}), "student", batch)


def test_dropping_text_that_the_network_needs_is_refused_at_the_start(models):
    with pytest.raises(ValueError, match="can't run without text"):
        make_method(models, cfg_uncond={"text": "drop"})


def test_text_only_rows_train(models, batch):
    del batch["vae_latent"]
    batch["latent_shape"] = (4, 3, 4, 4)
    assert torch.isfinite(only_term(make_method(models), "student", batch).loss)


def test_critics_own_optimizer_settings(models):
    method = make_method(models, fake_score_learning_rate=1e-3, fake_score_betas=(0.0, 0.9))
    assert method.optimizer_overrides("student") == {}
    assert method.optimizer_overrides("critic") == {"learning_rate": 1e-3, "betas": (0.0, 0.9)}


def test_roles_are_checked(models, tiny_wan):
    with pytest.raises(ValueError, match="missing: critic"):
        DMD2Method({"student": models["student"], "teacher": models["teacher"]})
    with pytest.raises(ValueError, match=r"models\.teacher\.trainable: false"):
        DMD2Method({**models, "teacher": make_model(tiny_wan, 2, trainable=True)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_score_sigma": 0.9, "max_score_sigma": 0.5}, "must be below"),
        ({"dmd_denoising_steps": [500, 250]}, "starts at 500"),
        ({"generator_update_interval": 0}, "greater than or equal to 1"),
        ({"rollout_mode": "dream"}, "simulate"),
        ({"guidance": 3}, "guidance"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DMD2Options(**options)
