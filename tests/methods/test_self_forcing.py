"""Self-Forcing against its equation written out with bare network calls, and replay against the plain graph."""

import itertools

import pytest
import torch
from tiny_models import TEXT_LENGTH, make_tiny_transformer

from fv_distill.methods import DMD2Method, DMD2Options, SelfForcingMethod, SelfForcingOptions
from fv_distill.models import CausalWanModel, WanModel
from fv_distill.models.transformers.wan_causal import CausalWanTransformer3DModel
from fv_distill.rng import SampleRng

FRAMES = 6
STEPS = (1000.0, 750.0, 500.0)


def causal(tiny_wan, *, seed=1, chunk_size=2, **options):
    stock = make_tiny_transformer(seed)
    network = CausalWanTransformer3DModel.from_config(stock.config)
    network.load_state_dict(stock.state_dict())
    return CausalWanModel(
        network,
        directory=tiny_wan,
        flow_shift=3.0,
        trainable=True,
        negative_prompt="bad",
        text_length=TEXT_LENGTH,
        chunk_size=chunk_size,
        **options,
    )


def bidirectional(tiny_wan, seed, *, trainable):
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
        "student": causal(tiny_wan),
        "teacher": bidirectional(tiny_wan, 2, trainable=False),
        "critic": bidirectional(tiny_wan, 3, trainable=True),
    }


@pytest.fixture
def long_batch(batch):
    latents = torch.randn(2, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(5))
    return {**batch, "vae_latent": latents}


def make_method(models, **options):
    method = SelfForcingMethod(models, SelfForcingOptions(dmd_denoising_steps=STEPS, **options))
    method.encode_prompts()
    return method


def student_gradients(method, batch, step):
    """The sums of losses, and the gradients of one student update as the trainer takes them."""
    network, total = method.student.transformer, 0.0
    network.zero_grad()
    terms = 0
    for term in method.losses("student", batch, SampleRng(0, step, batch["sample_index"])):
        term.loss.backward()
        total += term.loss.item()
        terms += 1
    return total, terms, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


def assert_close(gradients, expected, tolerance=1e-6):
    assert max(g.abs().max() for g in expected) > 1e-4, "gradients that vanish prove nothing"
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=tolerance, rtol=1e-4)


# Gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"same_step_across_blocks": False},
        {"start_gradient_frame": 2},
        {"context_noise": 0.1, "student_sample_type": "ode"},
        {"last_step_only": True},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_replay_equals_the_plain_graph(models, long_batch, options, checkpointing):
    if checkpointing:
        models["student"].transformer.enable_gradient_checkpointing()
    for step in (1, 2, 3):
        plain = student_gradients(make_method(models, gradient_replay=False, **options), long_batch, step)
        replayed = student_gradients(make_method(models, **options), long_batch, step)
        assert replayed[0] == pytest.approx(plain[0], rel=1e-5)
        assert (plain[1], replayed[1]) == (1, 2 if "start_gradient_frame" in options else 3)
        assert_close(replayed[2], plain[2])


def test_gradients_equal_the_written_out_equation(models, long_batch):
    """Chunks over one masked forward with clean history instead of a cache; direction and slices by hand."""
    step = 4
    _, _, actual = student_gradients(make_method(models, real_score_guidance_scale=3.0), long_batch, step)
    student, text = models["student"], long_batch["text_embedding"]
    student.transformer.zero_grad()
    rng = SampleRng(0, step, long_batch["sample_index"])
    exit_step = rng.shared_integer("student/exit", 3)
    sigmas = (1.0, 0.9, 0.75)
    shape = (4, FRAMES, 4, 4)
    conditioning = student.prepare_batch(long_batch, latents_source="zeros").conditioning
    history = torch.zeros(2, *shape)
    clean = []
    for start in range(0, FRAMES, 2):
        frames = slice(start, start + 2)
        x_t = rng.normal("student/rollout", shape)
        for index in range(exit_step + 1):
            level = torch.full((2,), sigmas[index])
            with torch.set_grad_enabled(index == exit_step):
                # What the other chunks hold is seen by nobody: the chunk sees itself and the history before it.
                velocity = streamed_by_mask(student, x_t, level, conditioning, history, frames)
                x0 = x_t[:, :, frames] - sigmas[index] * velocity
            if index < exit_step:
                fresh = rng.normal(f"student/rollout/{index}", shape)
                x_t = fresh * sigmas[index + 1]
                x_t[:, :, frames] += (1 - sigmas[index + 1]) * x0
        clean.append(x0)
        history[:, :, frames] = x0.detach()
    generated = torch.cat(clean, dim=2)
    with torch.no_grad():
        u = rng.uniform("score/sigma")
        sigma = (3 * u / (1 + 2 * u)).clamp(0.02, 0.98)
        level = sigma.view(-1, 1, 1, 1, 1)
        x_t = (1 - level) * generated + level * rng.normal("score/noise", shape)
        negative = student.encode_prompts(["bad"]).text.expand(2, -1, -1)
        cond, uncond = (
            models["teacher"].transformer(x_t, 1000 * sigma, t, return_dict=False)[0] for t in (text, negative)
        )
        real = x_t - level * (uncond + 3.0 * (cond - uncond))
        fake = x_t - level * models["critic"].transformer(x_t, 1000 * sigma, text, return_dict=False)[0]
        direction = (fake - real) / (generated - real).abs().mean((1, 2, 3, 4), keepdim=True)
    (generated * direction / generated.numel()).sum().backward()
    assert exit_step > 0, "a step with an inner denoising step shows more"
    # The masked forward also sends gradients into the history's own keys and values, which streaming holds constant:
    # the output layers, which history does not pass on its way to a chunk, are where the two have to agree.
    names = [name for name, _ in student.transformer.named_parameters()]
    written_out = [p.grad for p in student.transformer.parameters()]
    for name, gradient, expected in zip(names, actual, written_out, strict=True):
        if name.startswith(("proj_out", "scale_shift_table", "blocks.1.ffn")):
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def streamed_by_mask(student, x_t, level, conditioning, history, frames):
    return student.predict_velocity(x_t, level, conditioning, clean_history=history)[:, :, frames]


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
def test_one_chunk_is_dmd2(tiny_wan, models, long_batch, sample_type):
    """With one chunk over the whole clip the student is bidirectional, and the two methods draw the same numbers."""
    models["student"] = causal(tiny_wan, chunk_size=FRAMES)
    forced = student_gradients(make_method(models, student_sample_type=sample_type), long_batch, 3)
    dmd2 = DMD2Method(
        {**models, "student": bidirectional(tiny_wan, 1, trainable=True)},
        DMD2Options(dmd_denoising_steps=STEPS, student_sample_type=sample_type),
    )
    dmd2.encode_prompts()
    expected = student_gradients(dmd2, long_batch, 3)
    assert forced[0] == pytest.approx(expected[0], rel=1e-5)
    assert_close(forced[2], expected[2])


def test_frames_before_start_gradient_frame_get_none(models, long_batch):
    method = make_method(models, start_gradient_frame=4)
    network = models["student"].transformer
    seen = []
    network.register_forward_hook(lambda *args: seen.append((args[2][0].requires_grad, args[2][0].shape[2])))
    terms = list(method.losses("student", long_batch, SampleRng(0, 2, [0, 1])))
    assert len(terms) == 1 and sum(with_grad for with_grad, _ in seen) == 1


# Random numbers and calls


def test_the_exit_step_is_shared_by_ranks_and_varies_over_steps(models):
    method = make_method(models)
    drawn = [method._exit_steps(SampleRng(0, step, [0, 1]), "student", 3) for step in range(1, 12)]
    elsewhere = [method._exit_steps(SampleRng(0, step, [8, 9]), "student", 3) for step in range(1, 12)]
    assert drawn == elsewhere
    assert all(len(set(steps)) == 1 for steps in drawn) and {steps[0] for steps in drawn} == {0, 1, 2}
    own = make_method(models, same_step_across_blocks=False)
    assert any(len(set(own._exit_steps(SampleRng(0, step, [0]), "student", 3))) > 1 for step in range(1, 12))
    last = make_method(models, last_step_only=True)
    assert last._exit_steps(SampleRng(0, 1, [0]), "student", 3) == [2, 2, 2]


def count_calls(models):
    calls = dict.fromkeys(models, 0)
    for name, model in models.items():
        model.transformer.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    return calls


@pytest.mark.parametrize("replay", [True, False])
def test_a_cycle_makes_the_fewest_calls_possible(models, long_batch, replay):
    """A student and a critic update on one rollout: exit + 1 calls a chunk, a context pass for all but the last."""
    method = make_method(models, gradient_replay=replay, real_score_guidance_scale=3.0, generator_update_interval=1)
    calls = count_calls(models)
    rng = SampleRng(0, 4, [0, 1])
    depth = rng.shared_integer("student/exit", 3) + 1
    for role in method.updates(4):
        for term in method.losses(role, long_batch, rng):
            term.loss.backward()
    assert calls == {"student": 3 * depth + 2 + (3 if replay else 0), "teacher": 2, "critic": 2}


def test_the_critic_learns_from_the_student_s_rollout_without_touching_it(models, long_batch):
    method = make_method(models)
    rng = SampleRng(0, 1, [0, 1])
    (term,) = method.losses("critic", long_batch, rng)
    term.loss.backward()
    assert all(p.grad is not None for p in models["critic"].transformer.parameters())
    assert all(p.grad is None for p in models["student"].transformer.parameters())


def test_context_noise_changes_what_later_chunks_see(models, long_batch):
    clips = []
    for level in (0.0, 0.3):
        method = make_method(models, context_noise=level)
        prepared = method._prepare(long_batch)
        clips.append(method._rollout(prepared, SampleRng(0, 1, [0, 1]), "student", grad=False))
    assert torch.equal(clips[0][:, :, :2], clips[1][:, :, :2])
    assert not torch.allclose(clips[0][:, :, 2:], clips[1][:, :, 2:], atol=1e-4)


def test_without_gradients_in_the_rollout_only_the_critic_is_updated(models):
    method = make_method(models, enable_gradient_in_rollout=False, generator_update_interval=1)
    assert [method.updates(step) for step in (1, 2)] == [("critic",), ("critic",)]


def test_score_sigma_stays_in_its_bounds(models, long_batch):
    method = make_method(models, min_score_sigma=0.4, max_score_sigma=0.5)
    seen = []
    models["teacher"].transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    for step in (1, 2, 3):
        list(method.losses("student", long_batch, SampleRng(0, step, [0, 1])))
    values = torch.cat(seen) / 1000
    assert values.min() >= 0.4 and values.max() <= 0.5


# Mistakes


def test_mistakes_are_named_at_the_start(tiny_wan, models):
    stock = {**models, "student": bidirectional(tiny_wan, 1, trainable=True)}
    with pytest.raises(ValueError, match=r"models.student._target_: fv_distill.models.CausalWanModel"):
        SelfForcingMethod(stock)
    with pytest.raises(ValueError, match=r"method.chunk_size=3 contradicts models.student.chunk_size=2"):
        make_method(models, chunk_size=3)
    with pytest.raises(ValueError, match=r"method.start_gradient_frame=3 .*multiple of models.student.chunk_size=2"):
        make_method(models, start_gradient_frame=3)
    with pytest.raises(ValueError, match="rollout_mode"):
        SelfForcingOptions(rollout_mode="data_latent")


def test_a_clip_without_gradient_frames_is_refused(models, long_batch):
    method = make_method(models, start_gradient_frame=6)
    with pytest.raises(ValueError, match=r"method.start_gradient_frame=6 leaves no gradient: .* 6 latent frames"):
        next(itertools.chain(method.losses("student", long_batch, SampleRng(0, 1, [0, 1]))))
