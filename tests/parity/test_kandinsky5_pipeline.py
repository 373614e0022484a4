"""One denoising step of diffusers' Kandinsky5T2VPipeline against the adapter's."""

import pytest
import torch
from diffusers import Kandinsky5T2VPipeline
from tiny_kandinsky5 import FLOW_SHIFT, LATENT_CHANNELS, POOLED_DIM, make_tiny_kandinsky5_directory
from tiny_models import TEXT_LENGTH

from fv_distill.models import Conditioning, Kandinsky5Model
from fv_distill.schedules import flow

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad"


@pytest.fixture(scope="module", params=[True, False], ids=["visual_cond", "plain"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("kandinsky5") / "model"
    return make_tiny_kandinsky5_directory(path, visual_cond=request.param)


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = Kandinsky5T2VPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(directory):
    return Kandinsky5Model.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH)


def run_pipeline(pipeline, *, guidance_scale=1.0, steps=1, output_type="latent", size=32):
    """The video or latents `[B, C, T, H, W]`, and the noise that they were made of."""
    with torch.no_grad():
        frames = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=size,
            width=size,
            num_frames=9,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=TEXT_LENGTH,
            output_type=output_type,
        ).frames
    noise = torch.randn(1, 3, size // 8, size // 8, LATENT_CHANNELS, generator=torch.Generator().manual_seed(0))
    return (frames.permute(0, 4, 1, 2, 3) if output_type == "latent" else frames), noise.permute(0, 4, 1, 2, 3)


@torch.no_grad()
def run_adapter(model, pipeline, noise, *, guidance_scale=1.0):
    """Euler steps over the pipeline's own sigmas."""
    positive, negative = model.prompt_conditioning(PROMPT), model.negative_conditioning()
    x_t = noise
    for sigma, following in zip(pipeline.scheduler.sigmas, pipeline.scheduler.sigmas[1:], strict=False):
        velocity = model.predict_velocity(x_t, sigma[None], positive)
        if guidance_scale != 1:
            velocity = flow.guide(velocity, model.predict_velocity(x_t, sigma[None], negative), guidance_scale)
        x_t = x_t + (following - sigma) * velocity
    return x_t


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, guidance_scale, steps):
    expected, noise = run_pipeline(pipeline, guidance_scale=guidance_scale, steps=steps)
    actual = run_adapter(model, pipeline, noise, guidance_scale=guidance_scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_positions_of_480p_are_the_pipelines(pipeline, model):
    expected, noise = run_pipeline(pipeline, size=480)
    torch.testing.assert_close(run_adapter(model, pipeline, noise), expected, atol=1e-5, rtol=0)


def test_clips_of_a_batch_have_their_own_text(model):
    """Padding is not seen, whatever the longest text of the batch."""
    both = model.encode_prompts([PROMPT, NEGATIVE])
    assert both.text_mask.sum(1).tolist() == [6, 2]
    assert both.text[1, 2:].abs().max() == 0
    x_t, sigma = torch.randn(2, LATENT_CHANNELS, 3, 4, 4), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        together = model.predict_velocity(x_t, sigma, both)
        alone = model.predict_velocity(x_t[1:], sigma[1:], model.encode_prompts([NEGATIVE]))
    torch.testing.assert_close(together[1:], alone, atol=1e-6, rtol=0)


def test_decoded_video_equals_the_pipelines(pipeline, model):
    expected, _ = run_pipeline(pipeline, output_type="pt")
    latents, _ = run_pipeline(pipeline)
    video = model.decode_latents(latents)
    assert video.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)
    raw = model.encoders().encode_video(video)
    torch.testing.assert_close(model.raw_latents(model.normalize_latents(raw)), raw)


def test_pooled_text_and_time_reach_the_network(model):
    own, x_t = model.prompt_conditioning(PROMPT), torch.randn(1, LATENT_CHANNELS, 3, 4, 4)
    other = Conditioning(own.text, own.text_mask, {"pooled_text_embedding": torch.ones(1, POOLED_DIM)})
    with torch.no_grad():
        before = model.predict_velocity(x_t, torch.tensor([0.5]), own)
        assert (model.predict_velocity(x_t, torch.tensor([0.5]), other) - before).abs().max() > 1e-3
        assert (model.predict_velocity(x_t, torch.tensor([0.51]), own) - before).abs().max() > 1e-4


def test_what_the_directory_tells(model):
    assert model.flow_shift == FLOW_SHIFT
    assert model.transformer._no_split_modules == [
        "Kandinsky5TransformerEncoderBlock",
        "Kandinsky5TransformerDecoderBlock",
    ]
    with pytest.raises(ValueError, match="in_text_dim"):
        model.check_text((3, 7))
    with pytest.raises(ValueError, match="5 channels"):
        model.check_latent_shape((5, 3, 4, 4))


def test_sparse_networks_are_refused(tmp_path):
    directory = make_tiny_kandinsky5_directory(tmp_path / "sparse", attention_type="nabla")
    with pytest.raises(ValueError, match="nabla attention"):
        Kandinsky5Model.from_pretrained(str(directory))


def test_image_to_video_is_refused(tmp_path):
    directory = make_tiny_kandinsky5_directory(tmp_path / "i2v")
    index = directory / "model_index.json"
    index.write_text(index.read_text().replace("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"))
    with pytest.raises(ValueError, match="only text-to-video is handled"):
        Kandinsky5Model.from_pretrained(str(directory))


@pytest.mark.parametrize(("preset", "count"), [("attention", 20), ("all", 26), ("linear", 36)])
def test_lora_presets_match_the_layers_they_name(directory, preset, count):
    model = Kandinsky5Model.from_pretrained(str(directory))
    model.add_lora("student", rank=2, target_modules=preset)
    assert len([name for name, _ in model.transformer.named_modules() if name.endswith(".lora_A")]) == count
