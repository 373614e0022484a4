"""One denoising step of diffusers' Cosmos pipelines, Predict2.5 and Predict2, against the adapter's."""

from dataclasses import replace

import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline, Cosmos2VideoToWorldPipeline, FlowMatchEulerDiscreteScheduler
from euler import euler
from tiny_cosmos import (
    LATENT_CHANNELS,
    PassingChecker,
    make_tiny_cosmos2_directory,
    make_tiny_cosmos_directory,
)
from tiny_models import TEXT_LENGTH

from fv_distill.models import CosmosModel

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_cosmos_directory(tmp_path_factory.mktemp("cosmos") / "model")


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = Cosmos2_5_PredictBasePipeline.from_pretrained(directory, safety_checker=PassingChecker())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipeline


def make_model(directory, **options):
    return CosmosModel.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH, **options)


@pytest.fixture(scope="module")
def model(directory):
    return make_model(directory)


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def video():
    return torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1))


def run_pipeline(pipeline, noise, *, guidance_scale=1.0, steps=1, output_type="latent", **inputs):
    with torch.no_grad():
        return pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=32,
            width=32,
            num_frames=9,
            latents=noise.clone(),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=TEXT_LENGTH,
            output_type=output_type,
            **inputs,
        ).frames


def run_adapter(model, sigmas, noise, *, scale, extras=None):
    texts = model.prompt_conditioning(PROMPT), model.negative_conditioning()
    positive, negative = (replace(text, extras=extras or {}) for text in texts)
    return euler(model, noise, sigmas, positive, negative, scale=scale)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_text2world_equals_the_pipelines(pipeline, model, noise, scale, steps):
    arguments = model.sampling_arguments(scale)
    assert arguments == {"guidance_scale": 1.0 if scale == 1 else scale - 1}
    expected = run_pipeline(pipeline, noise, steps=steps, **arguments)
    actual = run_adapter(model, pipeline.scheduler.sigmas, noise, scale=scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 2])
def test_video2world_equals_the_pipelines(pipeline, directory, noise, video, count, scale):
    """Three steps: given frames come to rest at their latents, while the others are denoised beside them."""
    model = make_model(directory, condition_frames=count)
    arguments = model.sampling_arguments(scale)
    expected = run_pipeline(
        pipeline, noise, steps=3, video=2 * video - 1, num_latent_conditional_frames=count, **arguments
    )
    # The pipeline's condition is the clip's end, continued by its last frame.
    last = video[:, :, -(4 * (count - 1) + 1) :]
    condition = torch.cat([last, last[:, :, -1:].repeat(1, 1, 9 - last.shape[2], 1, 1)], dim=2)
    latents = model.encoders().encode_video(condition)
    extras = model._conditioning(_batch(model, latents)).extras
    actual = run_adapter(model, pipeline.scheduler.sigmas, noise, scale=scale, extras=extras)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    frames = model.normalize_latents(latents)[:, :, :count]
    torch.testing.assert_close(actual[:, :, :count], frames, atol=1e-4, rtol=0)
    text_only = run_adapter(make_model(directory), pipeline.scheduler.sigmas, noise, scale=scale)
    assert (text_only - actual)[:, :, count:].abs().max() > 1e-3


def _batch(model, latents):
    positive = model.prompt_conditioning(PROMPT)
    return {"text_embedding": positive.text, "text_mask": positive.text_mask, "vae_latent": latents}


def test_a_sigma_for_each_frame_is_the_networks_own(model, noise):
    text, sigma = model.prompt_conditioning(PROMPT), torch.tensor([0.3])
    with torch.no_grad():
        same = model.predict_velocity(noise, sigma.expand(1, 3), text)
        torch.testing.assert_close(same, model.predict_velocity(noise, sigma, text), atol=1e-6, rtol=0)
        other = model.predict_velocity(noise, torch.tensor([[0.3, 0.9, 0.3]]), text)
    assert (other - same).abs().max() > 1e-4


def test_decoded_video_equals_the_pipelines(pipeline, model, noise):
    expected = run_pipeline(pipeline, noise, output_type="pt")
    video = model.decode_latents(run_pipeline(pipeline, noise))
    assert video.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_flow_shift_is_read_from_the_directory(model):
    assert model.flow_shift == 1.0


@pytest.fixture(scope="module")
def predict2(tmp_path_factory):
    directory = make_tiny_cosmos2_directory(tmp_path_factory.mktemp("cosmos2") / "model")
    pipeline = Cosmos2VideoToWorldPipeline.from_pretrained(directory, safety_checker=PassingChecker())
    pipeline.set_progress_bar_config(disable=True)
    return directory, pipeline


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("fps", [None, 10.0])
def test_predict2_in_edm_terms_is_the_same_network(predict2, noise, video, scale, fps, monkeypatch):
    """A step of the pipeline from a middle EDM noise level s to the next, in our x_t = (x0 + s eps) / (1 + s).

    At its first level, 80, the pipeline's own rounding is a few times 1e-5.
    """
    directory, pipeline = predict2
    model = make_model(directory, condition_frames=1, fps=fps)
    # The latents of the condition are drawn from the VAE's posterior, where the adapter takes its mode.
    monkeypatch.setattr("diffusers.pipelines.cosmos.pipeline_cosmos2_video2world.retrieve_latents", _mode)
    states = []
    monkeypatch.setattr(type(pipeline.scheduler), "step", _keep_first(states, type(pipeline.scheduler).step))
    arguments = model.sampling_arguments(scale) | ({} if fps is None else {"fps": fps})
    run_pipeline(pipeline, noise, steps=3, image=2 * video[:, :, 0] - 1, **arguments)
    (before, after), s = states[1], pipeline.scheduler.sigmas[1:3]
    assert 0.1 < s[0] < 10
    latents = model.encoders().encode_video(video[:, :, :1].repeat(1, 1, 9, 1, 1))
    extras = model._conditioning(_batch(model, latents)).extras
    flow_sigmas = s / (1 + s)
    actual = run_adapter(model, flow_sigmas, before / (1 + s[0]), scale=scale, extras=extras)
    torch.testing.assert_close(actual, after / (1 + s[1]), atol=1e-5, rtol=0)


def _mode(output, generator=None, sample_mode="sample"):
    return output.latent_dist.mode()


def _keep_first(states, step):
    def stepped(self, model_output, timestep, sample, **kwargs):
        result = step(self, model_output, timestep, sample, **kwargs)
        states.append((sample, result[0]))
        return result

    return stepped
