"""One denoising step of diffusers' HunyuanVideo15Pipeline against the adapter's."""

from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from diffusers.image_processor import VaeImageProcessor
from euler import euler
from tiny_hunyuan import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    make_tiny_hunyuan15_directory,
    make_tiny_hunyuan15_i2v_directory,
)
from tiny_models import TEXT_LENGTH

from fv_distill.models import HunyuanVideo15Model

PROMPT, NEGATIVE, WITH_GLYPHS = "a handwritten digit moving left", "bad", 'the digit "3" moving left'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_hunyuan15_directory(tmp_path_factory.mktemp("hunyuan15") / "model")


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    # Padded to 1000 tokens otherwise, which takes no part in the output.
    pipeline.tokenizer_max_length = TEXT_LENGTH + 4
    return pipeline


@pytest.fixture(scope="module")
def model(directory):
    return HunyuanVideo15Model.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH)


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def run_pipeline(pipeline, noise, *, prompt=PROMPT, scale=1.0, steps=1, output_type="latent"):
    pipeline.guider = pipeline.guider.new(guidance_scale=scale)
    with torch.no_grad():
        return pipeline(
            prompt,
            negative_prompt=NEGATIVE,
            height=32,
            width=32,
            num_frames=9,
            latents=noise,
            num_inference_steps=steps,
            output_type=output_type,
        ).frames


def run_adapter(model, pipeline, noise, *, scale, prompt=PROMPT, extras=None):
    texts = model.prompt_conditioning(prompt), model.negative_conditioning()
    positive, negative = (replace(text, extras={**text.extras, **(extras or {})}) for text in texts)
    return euler(model, noise, pipeline.scheduler.sigmas, positive, negative, scale=scale)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("prompt", [PROMPT, WITH_GLYPHS])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, noise, scale, prompt, steps):
    expected = run_pipeline(pipeline, noise, prompt=prompt, scale=scale, steps=steps)
    actual = run_adapter(model, pipeline, noise, scale=scale, prompt=prompt)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_decoded_video_equals_the_pipelines(pipeline, model, noise):
    expected = run_pipeline(pipeline, noise, output_type="pt")
    video = model.decode_latents(run_pipeline(pipeline, noise))
    assert video.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_what_is_in_quotes_is_read_by_the_second_encoder(model):
    plain, quoted = model.encode_prompts([PROMPT]), model.encode_prompts([WITH_GLYPHS])
    assert not bool(plain.extras["text_mask_2"].any()) and plain.extras["text_embedding_2"].abs().max() == 0
    assert bool(quoted.extras["text_mask_2"].any())
    assert plain.text[~plain.text_mask].abs().max() == 0


def test_rows_of_a_batch_do_not_see_each_other(model, noise):
    both = model.encode_prompts([PROMPT, WITH_GLYPHS])
    sigma = torch.tensor([0.9, 0.4])
    x_t = torch.cat([noise, -noise])
    with torch.no_grad():
        together = model.predict_velocity(x_t, sigma, both)
        alone = [model.predict_velocity(x_t[i : i + 1], sigma[i : i + 1], both.row(i)) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_flow_shift_is_read_from_the_directory(model):
    assert model.flow_shift == FLOW_SHIFT


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_image_to_video_equals_the_pipelines(tmp_path, noise, scale):
    directory = make_tiny_hunyuan15_i2v_directory(tmp_path / "model")
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.tokenizer_max_length = TEXT_LENGTH
    pipeline.guider = pipeline.guider.new(guidance_scale=scale)
    model = HunyuanVideo15Model.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH)
    # Whole steps of a picture file's 255, so that both see the same pixels.
    video = torch.randint(0, 256, (1, 3, 9, 32, 32), generator=torch.Generator().manual_seed(1)) / 255
    (image,) = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(video[:, :, 0]))
    expected = pipeline(
        image=image,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=9,
        latents=noise,
        num_inference_steps=3,
        output_type="latent",
    ).frames
    encoders = model.encoders()
    columns = encoders.encode_images(video)
    text = model.encode_prompts([PROMPT])
    batch = {"text_embedding": text.text, "text_mask": text.text_mask, **text.extras, **columns}
    batch["vae_latent"] = encoders.encode_video(video)
    # The first latent frame of a clip is that of its first frame alone.
    first = model.normalize_latents(batch["vae_latent"])[:, :, :1]
    torch.testing.assert_close(first, columns["first_frame_latent"], atol=1e-5, rtol=0)
    extras = {name: model.prepare_batch(batch).conditioning.extras[name] for name in columns}
    actual = run_adapter(model, pipeline, noise, scale=scale, extras=extras)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    without = run_adapter(model, pipeline, noise, scale=scale)
    assert (without - actual).abs().max() > 1e-3
