"""Denoising steps of diffusers' Wan pipelines for images and for two experts against the adapters'."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from tiny_models import LATENT_CHANNELS, TEXT_LENGTH
from tiny_wan import (
    BOUNDARY,
    CLIP_TEXT_LENGTH,
    make_ti2v_directory,
    make_wan21_i2v_directory,
    make_wan22_i2v_directory,
    make_wan22_t2v_directory,
)

from fv_distill.models import Conditioning, UncondPolicy, WanImageToVideoModel, WanModel, unconditional
from fv_distill.schedules import flow

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad digit"
FRAMES = 9


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan_family")
    return {
        "wan21_i2v": make_wan21_i2v_directory(root / "wan21_i2v"),
        "wan22_i2v": make_wan22_i2v_directory(root / "wan22_i2v"),
        "ti2v": make_ti2v_directory(root / "ti2v"),
        "wan22_t2v": make_wan22_t2v_directory(root / "wan22_t2v"),
    }


def pixels_per_latent(name):
    return 16 if name == "ti2v" else 8


def text_length(name):
    return CLIP_TEXT_LENGTH if name == "wan21_i2v" else TEXT_LENGTH


@pytest.fixture(scope="module")
def image():
    """Of the size that the larger VAE makes four latent pixels of."""
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def resized(image, name):
    size = 4 * pixels_per_latent(name)
    return Image.fromarray(image[:size, :size])


def as_video(picture):
    """The given picture and frames that nobody may look at, `[1, 3, F, H, W]` in [0, 1]."""
    first = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, :, None] / 255
    return torch.cat([first, torch.rand(1, 3, FRAMES - 1, *first.shape[-2:])], dim=2)


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def run_pipeline(kind, directory, name, noise, *, steps, image=None, **call):
    pipeline = kind.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    size = 4 * pixels_per_latent(name)
    given = {} if image is None else {"image": image}
    with torch.no_grad():
        latents = pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=size,
            width=size,
            num_frames=FRAMES,
            latents=noise,
            num_inference_steps=steps,
            max_sequence_length=text_length(name),
            output_type="latent",
            **given,
            **call,
        ).frames
    return latents, pipeline.scheduler.sigmas


def load(kind, directory, name, **options):
    return kind.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=text_length(name), **options)


def condition(model, picture):
    """Prompt and picture, and what guidance's other pass sees."""
    positive = model.prompt_conditioning(PROMPT)
    if picture is not None:
        extras = model.encoders().encode_images(as_video(picture))
        positive = Conditioning(positive.text, positive.text_mask, extras)
    return positive, unconditional(positive, UncondPolicy(), model.negative_conditioning())


@torch.no_grad()
def euler(model_at, noise, sigmas, picture, *, scale_at):
    """Euler steps over the pipeline's own sigmas; model and guidance may differ between levels."""
    x_t = noise
    for sigma, following in pairwise(sigmas):
        model, scale = model_at(float(sigma)), scale_at(float(sigma))
        positive, negative = condition(model, picture)
        velocity = model.predict_velocity(x_t, sigma[None], positive)
        if scale != 1:
            velocity = flow.guide(velocity, model.predict_velocity(x_t, sigma[None], negative), scale)
        x_t = x_t + (following - sigma) * velocity
    return x_t


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["wan21_i2v", "ti2v"])
def test_denoising_from_an_image_equals_the_pipelines(directories, image, noise, name, steps, guidance_scale):
    picture = resized(image, name)
    expected, sigmas = run_pipeline(
        WanImageToVideoPipeline,
        directories[name],
        name,
        noise,
        steps=steps,
        image=picture,
        guidance_scale=guidance_scale,
    )
    model = load(WanImageToVideoModel, directories[name], name)
    actual = euler(lambda _: model, noise, sigmas, picture, scale_at=lambda _: guidance_scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["wan22_i2v", "wan22_t2v"])
def test_two_experts_take_turns_as_in_the_pipelines(directories, image, noise, name):
    kind = WanImageToVideoModel if name == "wan22_i2v" else WanModel
    pipeline_class = WanImageToVideoPipeline if name == "wan22_i2v" else WanPipeline
    picture = resized(image, name) if name == "wan22_i2v" else None
    expected, sigmas = run_pipeline(
        pipeline_class,
        directories[name],
        name,
        noise,
        steps=4,
        image=picture,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
    )
    experts = {expert: load(kind, directories[name], name, expert=expert) for expert in ("high", "low")}
    used = []

    def model_at(sigma):
        used.append(next(name for name, model in experts.items() if model.covers(sigma)))
        return experts[used[-1]]

    actual = euler(model_at, noise, sigmas, picture, scale_at=lambda sigma: 4.0 if sigma >= BOUNDARY else 3.0)
    assert set(used) == {"high", "low"}
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_ti2v_makes_videos_of_text_alone_as_the_pipeline_does(directories, noise):
    expected, sigmas = run_pipeline(WanPipeline, directories["ti2v"], "ti2v", noise, steps=2, guidance_scale=4.0)
    for kind in (WanModel, WanImageToVideoModel):
        model = load(kind, directories["ti2v"], "ti2v")
        actual = euler(lambda _, model=model: model, noise, sigmas, None, scale_at=lambda _: 4.0)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["wan21_i2v", "wan22_i2v", "ti2v"])
def test_a_decoded_clip_equals_the_pipelines(directories, noise, name):
    """Decoding and its normalisation are the base class's; the VAE of TI2V 5B folds patches besides."""
    options = {"expert": "high"} if name == "wan22_i2v" else {}
    model = load(WanImageToVideoModel, directories[name], name, **options)
    pipeline = WanImageToVideoPipeline.from_pretrained(directories[name], transformer=None, transformer_2=None)
    with torch.no_grad():
        expected = pipeline.vae.decode(model.raw_latents(noise)).sample
    size = 4 * pixels_per_latent(name)
    video = model.decode_latents(noise)
    assert video.shape == (1, 3, FRAMES, size, size)
    torch.testing.assert_close(video, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
