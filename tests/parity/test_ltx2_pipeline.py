"""One denoising step of diffusers' LTX2Pipeline against the adapter's.

The adapter's picture doesn't see the sound. The pipeline makes such a pass for its modality guidance, and with a scale
of 0 for the picture that pass is what it samples with.
"""

import pytest
import torch
from diffusers import LTX2Pipeline
from euler import euler
from tiny_ltx2 import LATENT_CHANNELS, TEXT_DIM, make_tiny_ltx2_directory
from tiny_models import TEXT_LENGTH

from fv_distill.models import Conditioning, LTX2VideoModel

PROMPT = "a handwritten digit moving left"


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def directory(request, tmp_path_factory):
    return make_tiny_ltx2_directory(tmp_path_factory.mktemp("ltx2") / "model", is_newer=request.param == "2.3")


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = LTX2Pipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(directory):
    return LTX2VideoModel.from_pretrained(str(directory), text_length=TEXT_LENGTH, flow_shift=8.0)


def run_pipeline(pipeline, noise, options, *, steps=1):
    """Normalised latents."""
    latents = pipeline(
        PROMPT,
        height=64,
        width=64,
        num_frames=17,
        # The pipeline normalises latents that it is given, noise or not.
        latents=pipeline._denormalize_latents(noise, *statistics(pipeline)),
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=steps,
        max_sequence_length=TEXT_LENGTH,
        output_type="latent",
        return_dict=False,
        **options,
    )[0]
    return pipeline._normalize_latents(latents, *statistics(pipeline))


def statistics(pipeline):
    return pipeline.vae.latents_mean, pipeline.vae.latents_std, pipeline.vae.config.scaling_factor


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, noise, steps):
    options = model.sampling_arguments(1.0)
    expected = run_pipeline(pipeline, noise, options, steps=steps)
    assert (expected - noise).abs().max() > 1e-2
    actual = euler(model, noise, pipeline.scheduler.sigmas, model.prompt_conditioning(PROMPT))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    # Beside the sound, the picture is another one.
    beside = {**options, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    assert (run_pipeline(pipeline, noise, beside, steps=steps) - expected).abs().max() > 1e-4


def test_text_is_the_connectors(pipeline, model):
    text = model.encode_prompts([PROMPT, "bad"])
    assert text.text.shape[:2] == (2, TEXT_LENGTH) and bool(text.text_mask.all())
    with torch.no_grad():
        states, mask, _, _ = pipeline.encode_prompt(PROMPT, None, False, max_sequence_length=TEXT_LENGTH)
        expected, _, _ = pipeline.connectors(states, mask)
    torch.testing.assert_close(text.text[:1], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="connectors'"):
        model.check_text((8, TEXT_DIM + 1))


def test_latents_are_normalised_as_the_pipeline_does(pipeline, model):
    raw = torch.randn(2, LATENT_CHANNELS, 3, 2, 2)
    normalised = model.normalize_latents(raw)
    torch.testing.assert_close(normalised, pipeline._normalize_latents(raw, *statistics(pipeline)))
    torch.testing.assert_close(model.raw_latents(normalised), raw)
    video = model.decode_latents(normalised)
    assert video.shape == (2, 3, 17, 64, 64)
    assert model.encoders().encode_video(video).shape == raw.shape


def test_given_frames_are_at_timestep_zero(model, noise):
    own = model.prompt_conditioning(PROMPT)
    given = Conditioning(own.text, own.text_mask, {"first_frame_latent": torch.ones(1, LATENT_CHANNELS, 1, 2, 2)})
    seen = {}
    handle = model.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        x0 = model.predict_x0(noise, torch.tensor([0.5]), given)
    handle.remove()
    assert seen["timestep"].tolist() == [[0.0] * 4 + [500.0] * 8] and seen["sigma"].tolist() == [500.0]
    assert bool((seen["hidden_states"][:, :4] == 1).all())
    torch.testing.assert_close(x0[:, :, :1], given.extras["first_frame_latent"], atol=1e-5, rtol=0)


def test_what_is_not_trained_is_what_the_picture_does_not_depend_on(directory, noise):
    model = LTX2VideoModel.from_pretrained(
        str(directory), text_length=TEXT_LENGTH, flow_shift=8.0, trainable=True, gradient_checkpointing=True
    )
    model.predict_velocity(noise, torch.ones(1), model.prompt_conditioning(PROMPT)).square().mean().backward()
    parameters = dict(model.transformer.named_parameters())
    reached = {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert reached == {name for name in parameters if model.is_trained(name)}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == reached
    assert not any("audio" in name for name in reached) and len(reached) > 40


def test_lora_presets_match_the_layers_they_name(directory):
    for preset, count in (("attention", 16), ("all", 20)):
        model = LTX2VideoModel.from_pretrained(str(directory), flow_shift=8.0)
        model.add_lora("student", rank=2, target_modules=preset)
        adapted = [name for name, _ in model.transformer.named_modules() if name.endswith(".lora_A")]
        assert len(adapted) == count and not any("audio" in name for name in adapted)


def test_a_shift_that_depends_on_the_size_has_to_be_said(directory):
    with pytest.raises(ValueError, match="use_dynamic_shifting.*flow_shift"):
        LTX2VideoModel.from_pretrained(str(directory))
