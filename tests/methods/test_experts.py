"""Experts for a part of the noise levels: which levels they are trained at, and what is refused."""

import pytest
import torch
from tiny_models import TEXT_LENGTH
from tiny_wan import BOUNDARY, make_wan22_t2v_directory

from fv_distill.methods import (
    DiffusionForcingSFTMethod,
    DMD2Method,
    DMD2Options,
    FineTuneMethod,
    FineTuneOptions,
    KDMethod,
)
from fv_distill.models import WanModel
from fv_distill.rng import SampleRng
from fv_distill.schedules import density_sigma, shift_sigma, within_range

# The sigmas 1, 0.9, 0.75, 0.5 at the tiny directory's shift.
STEPS = (1000, 750, 500, 250)


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    return make_wan22_t2v_directory(tmp_path_factory.mktemp("experts") / "wan22")


def load(directory, expert, *, trainable=False, **options):
    return WanModel.from_pretrained(
        str(directory), expert=expert, trainable=trainable, text_length=TEXT_LENGTH, **options
    )


def make_roles(directory, expert, **options):
    return {
        "student": load(directory, expert, trainable=True, **options),
        "teacher": load(directory, expert, **options),
        "critic": load(directory, expert, trainable=True, **options),
    }


class Watch:
    """The sigmas that a model is called with."""

    def __init__(self, model):
        self.sigmas = []
        model.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: self.sigmas.append(kwargs["timestep"] / 1000), with_kwargs=True
        )

    @property
    def levels(self):
        return sorted({round(sigma, 5) for sigma in torch.cat(self.sigmas).tolist()})


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("sigma_range", [(0.875, 1.0), (0.0, 0.875)])
def test_a_part_of_a_density_is_its_conditional_distribution(density, sigma_range):
    """Against rejection: draws of the whole density that happen to lie in the range."""

    def quantile(u):
        return shift_sigma(density_sigma(u, density), 3.0)

    generator = torch.Generator().manual_seed(0)
    whole = quantile(torch.rand(200_000, generator=generator))
    kept = whole[(whole >= sigma_range[0]) & (whole <= sigma_range[1])].sort().values
    part = within_range(torch.rand(len(kept), generator=generator), quantile, sigma_range).sort().values
    assert part.min() >= sigma_range[0] and part.max() <= sigma_range[1]
    assert (part - kept).abs().max() < 0.02


def test_the_whole_range_changes_no_bit():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(within_range(u, lambda u: shift_sigma(u, 5.0), (0.0, 1.0)), shift_sigma(u, 5.0))


@pytest.mark.parametrize("expert", ["high", "low"])
def test_fine_tuning_draws_levels_of_the_experts_range(two_experts, batch, expert):
    student = load(two_experts, expert, trainable=True)
    method, watch = FineTuneMethod({"student": student}, FineTuneOptions(sigma_density="logit_normal")), Watch(student)
    for step in range(20):
        list(method.losses("student", batch, SampleRng(0, step, [0, 1])))
    sigmas = torch.cat(watch.sigmas)
    inside = sigmas >= BOUNDARY if expert == "high" else sigmas < BOUNDARY
    assert len(sigmas) == 40 and inside.all() and sigmas.std() > 0.01


def run_dmd2(models, batch, **options):
    method = DMD2Method(models, DMD2Options(dmd_denoising_steps=STEPS, generator_update_interval=1, **options))
    method.encode_prompts()
    for step in range(1, 13):
        for role in method.updates(step):
            for term in method.losses(role, batch, SampleRng(0, step, [0, 1])):
                term.loss.backward()
    return method


def test_a_high_noise_student_exits_and_is_scored_in_its_range(two_experts, batch):
    models = make_roles(two_experts, "high")
    watches = {role: Watch(model) for role, model in models.items()}
    method = run_dmd2(models, batch)
    assert watches["student"].levels == [0.9, 1.0]
    for role in ("teacher", "critic"):
        scored = torch.cat(watches[role].sigmas)
        assert scored.min() >= BOUNDARY and scored.max() <= 0.98 + 1e-6
    # What is exported is sampled at all four.
    assert method.few_step_sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5))


def test_a_low_noise_student_goes_on_where_the_high_noise_expert_ends(two_experts, batch):
    models = make_roles(two_experts, "low") | {"high_expert": load(two_experts, "high")}
    watches = {role: Watch(model) for role, model in models.items()}
    method = run_dmd2(models, batch)
    assert watches["high_expert"].levels == [0.9, 1.0]
    assert watches["student"].levels == [0.5, 0.75]
    assert torch.cat(watches["teacher"].sigmas).max() < BOUNDARY
    assert all(parameter.grad is None for parameter in models["high_expert"].transformer.parameters())
    assert any(parameter.grad is not None for parameter in models["student"].transformer.parameters())
    calls = {(call.role, call.grad): call.count for call in method.network_calls(1, 3)}
    assert calls["high_expert", False] == 2 and calls["student", False] == 0.5


def test_a_low_noise_student_denoises_clips(two_experts, batch):
    models = make_roles(two_experts, "low")
    watch = Watch(models["student"])
    run_dmd2(models, batch, rollout_mode="data_latent")
    assert watch.levels == [0.5, 0.75]


def test_a_rollout_over_two_experts_is_a_chain_of_their_calls(two_experts, batch):
    """The x0 that the low-noise student is trained on, written out."""
    models = make_roles(two_experts, "low") | {"high_expert": load(two_experts, "high")}
    method = DMD2Method(models, DMD2Options(dmd_denoising_steps=STEPS, student_sample_type="ode"))
    rng = SampleRng(0, 1, [0, 1])
    actual = method._rollout(models["student"].prepare_batch(batch), rng, "student", grad=True)
    x_t, text = rng.normal("student/rollout", batch["vae_latent"].shape[1:]), batch["text_embedding"]
    exit_step = (2, 3)[rng.shared_integer("student/exit", 2)]
    sigmas = (1.0, 0.9, 0.75, 0.5)
    for step in range(exit_step + 1):
        network = models["high_expert" if step < 2 else "student"].transformer
        sigma = torch.full((2,), sigmas[step])
        velocity = network(x_t, 1000 * sigma, text, return_dict=False)[0]
        x_t = x_t + ((sigmas[step + 1] if step < exit_step else 0) - sigmas[step]) * velocity
    torch.testing.assert_close(actual, x_t, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("expert", "changes", "options", "message"),
    [
        ("low", {}, {}, "models.high_expert to the expert that makes the steps before"),
        ("high", {"high_expert": "high"}, {}, "models.high_expert is only called in the rollouts"),
        ("low", {"high_expert": "high"}, {"rollout_mode": "data_latent"}, "models.high_expert is only called"),
        ("low", {"high_expert": "low"}, {}, "models.high_expert.expert: high"),
        ("high", {"teacher": "low"}, {}, r"models.teacher is for sigma \(0.0, 0.875\), but the student"),
        ("high", {}, {"max_score_sigma": 0.8}, "max_score_sigma=0.8 leave out the expert's whole range"),
    ],
)
def test_roles_that_do_not_fit_are_refused(two_experts, expert, changes, options, message):
    models = make_roles(two_experts, expert) | {role: load(two_experts, name) for role, name in changes.items()}
    with pytest.raises(ValueError, match=message):
        DMD2Method(models, DMD2Options(dmd_denoising_steps=STEPS, **options))


def test_steps_without_one_of_the_experts_are_refused(two_experts):
    with pytest.raises(ValueError, match="none of the sigmas 1 is in the expert's range"):
        DMD2Method(make_roles(two_experts, "low"), DMD2Options(dmd_denoising_steps=(1000,)))


def test_a_step_at_the_boundary_is_refused(two_experts):
    """The published boundary of image-to-video is a level of the usual steps at shift 3."""
    with pytest.raises(ValueError, match="0.9 is the boundary between the experts,"):
        DMD2Method(make_roles(two_experts, "high", boundary_ratio=0.9), DMD2Options(dmd_denoising_steps=STEPS))


@pytest.mark.parametrize("method", [KDMethod, DiffusionForcingSFTMethod])
def test_methods_of_all_noise_levels_refuse_an_expert(two_experts, method):
    with pytest.raises(ValueError, match="models.student is an expert for sigma 0.875 to 1 only"):
        method({"student": load(two_experts, "high", trainable=True)})
