"""LongCat-Video's pipeline against the adapter, and both against the published conventions.

The release's pipeline negates the network's output and hands it to an Euler scheduler of shift 12, whose sigmas are
spaced evenly from 1 to 0.001 before the shift; given frames have timestep 0 and are not stepped. diffusers has no
pipeline of this family: this one is the library's own, written apart from the adapter.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from euler import euler
from PIL import Image
from tiny_longcat import make_tiny_longcat_directory
from tiny_models import LATENT_CHANNELS, TEXT_LENGTH

from fv_distill.models import LongCatVideoModel
from fv_distill.models.pipelines import LongCatVideoPipeline

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad digit"


@pytest.fixture(scope="module", params=["published", "pipeline"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("longcat") / request.param
    return make_tiny_longcat_directory(path, published=request.param == "published")


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = LongCatVideoPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(directory):
    return LongCatVideoModel.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH)


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def image():
    return torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def run_pipeline(pipeline, noise, *, guidance_scale, steps, output_type="latent", **options):
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
        **{"zero_star": False} | options,
    ).frames


def run_adapter(model, pipeline, noise, *, guidance_scale, given=None):
    extras = {} if given is None else {"first_frame_latent": given}
    texts = model.prompt_conditioning(PROMPT), model.negative_conditioning()
    positive, negative = (replace(text, extras=extras) for text in texts)
    return euler(model, noise, pipeline.scheduler.sigmas, positive, negative, scale=guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, noise, guidance_scale, steps):
    expected = run_pipeline(pipeline, noise, guidance_scale=guidance_scale, steps=steps)
    actual = run_adapter(model, pipeline, noise, guidance_scale=guidance_scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_denoising_after_a_given_image_equals_the_pipelines(pipeline, model, noise, image, guidance_scale):
    given = model.normalize_latents(model.encoders().encode_video(image))
    expected = run_pipeline(pipeline, noise, guidance_scale=guidance_scale, steps=3, video=image)
    actual = run_adapter(model, pipeline, noise, guidance_scale=guidance_scale, given=given)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual[:, :, :1], given, atol=1e-5, rtol=0)
    free = run_pipeline(pipeline, noise, guidance_scale=guidance_scale, steps=3)
    assert (free - expected)[:, :, 1:].abs().max() > 1e-2


def test_an_image_is_a_video_of_one_frame(pipeline, noise):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, :, None] / 255
    of_image = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1, image=picture)
    of_video = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1, video=pixels)
    torch.testing.assert_close(of_image, of_video, atol=1e-5, rtol=0)
    larger = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1, image=picture.resize((80, 64)))
    assert larger.shape == noise.shape
    with pytest.raises(ValueError, match="leave one out"):
        run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1, image=picture, video=pixels)


def test_the_network_is_called_as_the_release_calls_it(pipeline, model, noise):
    """Minus its output, at 1000 sigma, from sigmas of shift 12."""
    run_pipeline(pipeline, noise, guidance_scale=1.0, steps=5)
    even = torch.linspace(1, 0.001, 5)
    torch.testing.assert_close(pipeline.scheduler.sigmas[:-1].cpu(), 12 * even / (1 + 11 * even), atol=1e-6, rtol=0)
    assert model.flow_shift == 12
    positive, sigma = model.prompt_conditioning(PROMPT), torch.tensor([0.7])
    with torch.no_grad():
        output = model.transformer(noise, 1000 * sigma, positive.text, positive.text_mask).sample
        torch.testing.assert_close(model.predict_velocity(noise, sigma, positive), -output)


def test_zero_star_guidance_projects_the_unconditional_velocity(pipeline, model, noise):
    positive, negative = model.prompt_conditioning(PROMPT), model.negative_conditioning()
    with torch.no_grad():
        conditional, unconditional = (model.predict_velocity(noise, torch.ones(1), c) for c in (positive, negative))
    scaled = unconditional * (conditional * unconditional).sum() / unconditional.square().sum()
    expected = noise - (scaled + 4 * (conditional - scaled))
    actual = run_pipeline(pipeline, noise, guidance_scale=4.0, steps=1, zero_star=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (actual - run_pipeline(pipeline, noise, guidance_scale=4.0, steps=1)).abs().max() > 1e-3


def test_decoded_video_equals_the_pipelines(pipeline, model, noise):
    latents = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1)
    expected = run_pipeline(pipeline, noise, guidance_scale=1.0, steps=1, output_type="pt")
    video = model.decode_latents(latents)
    assert video.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_sizes_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(ValueError, match="height=40 must be a multiple of 16"):
        pipeline(PROMPT, height=40, width=32, num_frames=9)
    with pytest.raises(ValueError, match="num_frames=10 must be a multiple of 4, plus 1"):
        pipeline(PROMPT, height=32, width=32, num_frames=10)
