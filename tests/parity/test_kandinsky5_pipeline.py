"""One denoising step of diffusers' Kandinsky5T2VPipeline against the adapter's."""

import pytest
import torch
from diffusers import Kandinsky5T2VPipeline
from tiny_hunyuan import LATENT_CHANNELS
from tiny_kandinsky5 import FLOW_SHIFT, make_tiny_kandinsky5_directory, make_tiny_kandinsky5_transformer
from tiny_models import TEXT_LENGTH

from fv_distill.models import Kandinsky5Model
from fv_distill.schedules import flow

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_kandinsky5_directory(tmp_path_factory.mktemp("kandinsky") / "model")


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = Kandinsky5T2VPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(directory):
    return Kandinsky5Model.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH)


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def run_pipeline(pipeline, noise, *, scale=1.0, steps=1, output_type="latent"):
    """The pipeline's own latents have their channels last, and beside them the empty place for an image."""
    latents = noise.movedim(1, -1)
    if pipeline.transformer.visual_cond:
        latents = torch.cat([latents, torch.zeros(*latents.shape[:-1], LATENT_CHANNELS + 1)], dim=-1)
    with torch.no_grad():
        frames = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=32,
            width=32,
            num_frames=9,
            latents=latents.clone(),
            num_inference_steps=steps,
            guidance_scale=scale,
            max_sequence_length=TEXT_LENGTH,
            output_type=output_type,
        ).frames
    return frames.movedim(-1, 1) if output_type == "latent" else frames


@torch.no_grad()
def run_adapter(model, pipeline, noise, *, scale):
    """Euler steps over the pipeline's own sigmas."""
    positive, negative = model.prompt_conditioning(PROMPT), model.negative_conditioning()
    x_t = noise
    for sigma, following in zip(pipeline.scheduler.sigmas, pipeline.scheduler.sigmas[1:], strict=False):
        velocity = model.predict_velocity(x_t, sigma[None], positive)
        if scale != 1:
            velocity = flow.guide(velocity, model.predict_velocity(x_t, sigma[None], negative), scale)
        x_t = x_t + (following - sigma) * velocity
    return x_t


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, noise, scale, steps):
    expected = run_pipeline(pipeline, noise, scale=scale, steps=steps)
    actual = run_adapter(model, pipeline, noise, scale=scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_decoded_video_equals_the_pipelines(pipeline, model, noise):
    expected = run_pipeline(pipeline, noise, output_type="pt")
    video = model.decode_latents(run_pipeline(pipeline, noise))
    assert video.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_rows_of_a_batch_have_texts_of_their_own_length(model, noise):
    both = model.encode_prompts([PROMPT, NEGATIVE])
    assert both.text_mask.sum(1).tolist() == [6, 2]
    sigma, x_t = torch.tensor([0.9, 0.4]), torch.cat([noise, -noise])
    with torch.no_grad():
        together = model.predict_velocity(x_t, sigma, both)
        alone = model.predict_velocity(x_t[1:], sigma[1:], model.encode_prompts([NEGATIVE]))
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


def test_positions_are_scaled_as_the_pipeline_scales_them(pipeline, model):
    for height, width in ((480, 832), (512, 768), (768, 1280), (32, 32)):
        assert model._position_scale((height // 8, width // 8)) == pipeline._get_scale_factor(height, width)


def test_what_is_refused(directory, tiny_wan, model):
    assert model.flow_shift == FLOW_SHIFT
    with pytest.raises(ValueError, match="sparse attention"):
        Kandinsky5Model.check_network(make_tiny_kandinsky5_transformer(attention_type="nabla").config, directory)
    with pytest.raises(ValueError, match="is a WanPipeline"):
        Kandinsky5Model.check_network(make_tiny_kandinsky5_transformer().config, tiny_wan)
    with pytest.raises(ValueError, match="in_text_dim is 16"):
        model.check_text((3, 12))


@pytest.mark.parametrize("preset", ["attention", "all", "linear"])
def test_lora_presets_name_layers_that_are_there(model, preset):
    names = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in Kandinsky5Model.lora_presets[preset]:
        assert any(name == target or name.endswith(f".{target}") for name in names), target
    if preset == "linear":
        targets = tuple(f".{target}" for target in Kandinsky5Model.lora_presets[preset])
        assert [name for name in names if not f".{name}".endswith(targets)] == []
