"""Knowledge distillation against its equations written out with bare network calls."""

import pytest
import torch
from tiny_models import TEXT_LENGTH, make_tiny_transformer

from fv_distill.methods import KDCausalMethod, KDCausalOptions, KDMethod, KDOptions
from fv_distill.models import CausalWanModel, WanModel
from fv_distill.models.transformers.wan_causal import CausalWanTransformer3DModel
from fv_distill.rng import SampleRng

SIGMAS = (1.0, 0.9, 0.75)
T_LIST = (999.0, 900.0, 750.0, 0.0)
FRAMES = 4


@pytest.fixture
def student(tiny_wan):
    return WanModel(
        make_tiny_transformer(1), directory=tiny_wan, flow_shift=3.0, trainable=True, text_length=TEXT_LENGTH
    )


@pytest.fixture
def causal_student(tiny_wan):
    stock = make_tiny_transformer(1)
    network = CausalWanTransformer3DModel.from_config(stock.config)
    network.load_state_dict(stock.state_dict())
    return CausalWanModel(
        network, directory=tiny_wan, flow_shift=3.0, trainable=True, text_length=TEXT_LENGTH, chunk_size=2
    )


@pytest.fixture
def paths(batch):
    states = torch.randn(2, 4, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(9))
    rest = {key: value for key, value in batch.items() if key != "vae_latent"}
    timesteps = torch.tensor([[1000.0, 900.0, 750.0, 0.0]] * 2)
    return {**rest, "trajectory_latents": states, "trajectory_timesteps": timesteps}


def only_term(method, batch, step=1):
    (term,) = method.losses("student", batch, SampleRng(0, step, batch["sample_index"]))
    return term


@pytest.mark.parametrize(("kind", "factor"), [("half_mse", 0.5), ("mse", 1.0)])
def test_the_loss_is_the_written_out_regression(student, paths, kind, factor):
    method = KDMethod({"student": student}, KDOptions(t_list=T_LIST, kd_loss=kind))
    drawn = set()
    for step in range(1, 7):
        index = (SampleRng(0, step, [0, 1]).uniform("step") * 3).long().tolist()
        drawn |= set(index)
        expected = 0.0
        for sample, state in enumerate(index):
            x_t = paths["trajectory_latents"][sample, state][None]
            sigma = torch.tensor([SIGMAS[state]])
            with torch.no_grad():
                velocity = student.transformer(
                    x_t, 1000 * sigma, paths["text_embedding"][sample][None], return_dict=False
                )[0]
            x0 = x_t - SIGMAS[state] * velocity
            expected += factor * (x0 - paths["trajectory_latents"][sample, -1]).square().mean().item() / 2
        assert only_term(method, paths, step).loss.item() == pytest.approx(expected, rel=1e-5)
    assert drawn == {0, 1, 2}


def test_states_are_found_by_their_timestep(student, paths):
    """A cache with all states of a path serves any list of timesteps among them."""
    states, timesteps = paths["trajectory_latents"], paths["trajectory_timesteps"]
    extra = torch.full_like(states[:, :1], 100.0)
    more = {
        **paths,
        "trajectory_latents": torch.cat([states[:, :1], extra, states[:, 1:]], dim=1),
        "trajectory_timesteps": torch.cat([timesteps[:, :1], torch.full((2, 1), 950.0), timesteps[:, 1:]], dim=1),
    }
    method = KDMethod({"student": student}, KDOptions(t_list=T_LIST))
    assert only_term(method, more).loss.item() == only_term(method, paths).loss.item()
    other = KDMethod({"student": student}, KDOptions(t_list=(999, 910, 0)))
    with pytest.raises(ValueError, match=r"lack \[910.0\] of method.t_list"):
        only_term(other, paths)


def test_causal_blocks_have_states_of_their_own(causal_student, paths):
    method = KDCausalMethod({"student": causal_student}, KDCausalOptions(t_list=T_LIST))
    differ = False
    for step in range(1, 5):
        index = (SampleRng(0, step, [0, 1]).uniform("step", (2,)) * 3).long()
        differ |= bool((index[:, 0] != index[:, 1]).any())
        x_t, sigma = torch.empty(2, 4, FRAMES, 4, 4), torch.empty(2, FRAMES)
        for sample in range(2):
            for frame in range(FRAMES):
                state = int(index[sample, frame // 2])
                x_t[sample, :, frame] = paths["trajectory_latents"][sample, state, :, frame]
                sigma[sample, frame] = SIGMAS[state]
        with torch.no_grad():
            velocity = causal_student.transformer(x_t, 1000 * sigma, paths["text_embedding"], return_dict=False)[0]
        x0 = x_t - sigma[:, None, :, None, None] * velocity
        expected = 0.5 * (x0 - paths["trajectory_latents"][:, -1]).square().mean().item()
        assert only_term(method, paths, step).loss.item() == pytest.approx(expected, rel=1e-5)
    assert differ


def test_teacher_forcing_shows_each_chunk_the_path_s_clean_end(causal_student, paths):
    method = KDCausalMethod({"student": causal_student}, KDCausalOptions(t_list=T_LIST, teacher_forcing=True))
    seen = []
    predict = causal_student.predict_velocity
    causal_student.predict_velocity = lambda *a, **k: seen.append(k["clean_history"]) or predict(*a, **k)
    forced = only_term(method, paths).loss.item()
    assert torch.equal(seen[0], paths["trajectory_latents"][:, -1])
    assert forced != only_term(KDCausalMethod({"student": causal_student}, KDCausalOptions(t_list=T_LIST)), paths).loss


def test_the_student_is_sampled_at_the_levels_it_was_trained_at(student):
    method = KDMethod({"student": student}, KDOptions())
    assert method.few_step_sigmas == (1.0, 0.937, 0.833, 0.624) and method.sample_type == "ode"


def test_mistakes_are_named(student, causal_student, batch):
    for t_list in ((999,), (900, 0), (999, 500), (999, 500, 500, 0)):
        with pytest.raises(ValueError, match="t_list"):
            KDOptions(t_list=t_list)
    with pytest.raises(ValueError, match="student_sample_steps=3 contradicts t_list, which makes 4"):
        KDOptions(student_sample_steps=3)
    with pytest.raises(ValueError, match="teacher_inference_steps=3 must be at least the 4 steps"):
        KDOptions(teacher_inference_steps=3)
    with pytest.raises(ValueError, match=r"models.student._target_: fv_distill.models.CausalWanModel"):
        KDCausalMethod({"student": student})
    with pytest.raises(ValueError, match="num_frames_per_block=3 cuts through chunks"):
        KDCausalMethod({"student": causal_student}, KDCausalOptions(num_frames_per_block=3))
    with pytest.raises(ValueError, match=r"trajectory_latents.*make-trajectories"):
        only_term(KDMethod({"student": student}), batch)
