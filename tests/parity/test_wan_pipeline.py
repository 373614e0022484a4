"""One denoising step of diffusers' WanPipeline against the adapter's."""

import pytest
import torch
from diffusers import WanPipeline
from euler import euler
from tiny_models import LATENT_CHANNELS, TEXT_LENGTH

from fv_distill.models import WanModel

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad digit"


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(tiny_wan):
    return WanModel.from_pretrained(str(tiny_wan), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH)


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def run_pipeline(pipeline, noise, *, guidance_scale, steps, output_type="latent"):
    with torch.no_grad():
        return pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=32,
            width=32,
            num_frames=9,
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=TEXT_LENGTH,
            output_type=output_type,
        ).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, noise, guidance_scale, steps):
    expected = run_pipeline(pipeline, noise, guidance_scale=guidance_scale, steps=steps)
    positive, negative = model.prompt_conditioning(PROMPT), model.negative_conditioning()
    actual = euler(model, noise, pipeline.scheduler.sigmas, positive, negative, scale=guidance_scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_x0_and_velocity_agree_with_one_step_to_the_end(pipeline, model, noise):
    expected = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1)
    with torch.no_grad():
        x0 = model.predict_x0(noise, torch.ones(1), model.prompt_conditioning(PROMPT))
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=0)


def test_decoded_video_equals_the_pipelines(pipeline, model, noise):
    expected = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1, output_type="pt")
    latents = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1)
    video = model.decode_latents(latents)
    assert video.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_flow_shift_is_read_from_the_directory(model):
    assert model.flow_shift == 3.0
