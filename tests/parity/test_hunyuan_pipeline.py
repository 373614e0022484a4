"""One denoising step of diffusers' HunyuanVideoPipeline against the adapter's."""

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from euler import euler
from tiny_hunyuan import FLOW_SHIFT, LATENT_CHANNELS, make_tiny_hunyuan_directory
from tiny_models import TEXT_LENGTH

from fv_distill.models import HunyuanVideoModel

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad"
EMBEDDED_GUIDANCE = 4.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_hunyuan_directory(tmp_path_factory.mktemp("hunyuan") / "model")


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = HunyuanVideoPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(directory):
    return HunyuanVideoModel.from_pretrained(
        str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH, embedded_guidance=EMBEDDED_GUIDANCE
    )


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def run_pipeline(pipeline, noise, *, true_cfg_scale=1.0, steps=1, output_type="latent"):
    with torch.no_grad():
        return pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=32,
            width=32,
            num_frames=9,
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=EMBEDDED_GUIDANCE,
            true_cfg_scale=true_cfg_scale,
            max_sequence_length=TEXT_LENGTH,
            output_type=output_type,
        ).frames


def run_adapter(model, pipeline, noise, *, scale):
    positive, negative = model.prompt_conditioning(PROMPT), model.negative_conditioning()
    return euler(model, noise, pipeline.scheduler.sigmas, positive, negative, scale=scale)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, noise, scale, steps):
    expected = run_pipeline(pipeline, noise, true_cfg_scale=scale, steps=steps)
    actual = run_adapter(model, pipeline, noise, scale=scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_decoded_video_equals_the_pipelines(pipeline, model, noise):
    expected = run_pipeline(pipeline, noise, output_type="pt")
    video = model.decode_latents(run_pipeline(pipeline, noise))
    assert video.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_text_is_masked_and_both_encoders_count(model, noise):
    with torch.no_grad():
        positive = model.prompt_conditioning(PROMPT)
        assert positive.text.shape == (1, TEXT_LENGTH, 16) and not bool(positive.text_mask.all())
        assert positive.text[~positive.text_mask].abs().max() == 0
        sigma = torch.full((1,), 0.7)
        expected = model.predict_velocity(noise, sigma, positive)
        padding = torch.where(positive.text_mask[..., None], positive.text, torch.tensor(9.0))
        changed = type(positive)(padding, positive.text_mask, positive.extras)
        torch.testing.assert_close(model.predict_velocity(noise, sigma, changed), expected, atol=1e-5, rtol=0)
        unmasked = type(positive)(positive.text, torch.ones_like(positive.text_mask), positive.extras)
        assert (model.predict_velocity(noise, sigma, unmasked) - expected).abs().max() > 1e-4
        pooled = {"pooled_text_embedding": -positive.extras["pooled_text_embedding"]}
        other = type(positive)(positive.text, positive.text_mask, pooled)
        assert (model.predict_velocity(noise, sigma, other) - expected).abs().max() > 1e-4


def test_flow_shift_is_read_from_the_directory(model):
    assert model.flow_shift == FLOW_SHIFT
