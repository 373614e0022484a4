"""One denoising step of diffusers' Kandinsky5T2VPipeline and Kandinsky5I2VPipeline against the adapter's."""

from dataclasses import replace

import pytest
import torch
from diffusers import Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from euler import euler
from tiny_hunyuan import LATENT_CHANNELS
from tiny_kandinsky5 import FLOW_SHIFT, make_tiny_kandinsky5_directory, make_tiny_kandinsky5_transformer
from tiny_models import TEXT_LENGTH

from fv_distill.losses.flow_matching import flow_matching_loss
from fv_distill.models import Kandinsky5Model
from fv_distill.schedules import flow

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad"
NUM_FRAMES, SHAPE = 17, (1, LATENT_CHANNELS, 5, 4, 4)
COLUMN = "first_frame_latent"


@pytest.fixture(scope="module", params=[Kandinsky5T2VPipeline, Kandinsky5I2VPipeline], ids=["t2v", "i2v"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def directory(kind, tmp_path_factory):
    return make_tiny_kandinsky5_directory(tmp_path_factory.mktemp("kandinsky") / "model", kind=kind)


@pytest.fixture(scope="module")
def pipeline(kind, directory):
    pipeline = kind.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        # The pipeline draws an image's latents; rows hold the most probable ones.
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        yield pipeline


@pytest.fixture(scope="module")
def model(directory):
    return Kandinsky5Model.from_pretrained(str(directory), negative_prompt=NEGATIVE, text_length=TEXT_LENGTH)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    """What the pipelines draw with the generator that they get below."""
    _, channels, *size = SHAPE
    return torch.randn(1, *size, channels, generator=torch.Generator().manual_seed(0)).movedim(-1, 1)


def condition(model, image, conditioning):
    """With the image, where there is to be one; a text has none."""
    extras = model.encoders().encode_images(image[:, :, None])
    count = len(conditioning.text)
    extras = {name: value.expand(count, *value.shape[1:]) for name, value in extras.items()}
    return replace(conditioning, extras={**conditioning.extras, **extras})


def run_pipeline(pipeline, image, *, scale=1.0, steps=1, num_frames=NUM_FRAMES):
    """The latents `[B, C, T, H, W]` after the last step and its output `[B, F, 3, H, W]`."""
    found = []

    def keep(pipeline, step, timestep, tensors):
        found.append(tensors["latents"][..., :LATENT_CHANNELS].movedim(-1, 1).clone())
        return {}

    with torch.no_grad():
        video = pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=32,
            width=32,
            num_frames=num_frames,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=steps,
            guidance_scale=scale,
            max_sequence_length=TEXT_LENGTH,
            output_type="pt",
            callback_on_step_end=keep,
            **({"image": image} if isinstance(pipeline, Kandinsky5I2VPipeline) else {}),
        ).frames
    return found[-1], video


def run_adapter(model, pipeline, image, noise, *, scale):
    positive, negative = (
        condition(model, image, text) for text in (model.prompt_conditioning(PROMPT), model.negative_conditioning())
    )
    return euler(model, noise, pipeline.scheduler.sigmas, positive, negative, scale=scale)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, image, noise, scale, steps):
    expected, _ = run_pipeline(pipeline, image, scale=scale, steps=steps)
    actual = run_adapter(model, pipeline, image, noise, scale=scale)
    assert (expected - noise)[:, :, 1:].abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_decoded_video_equals_the_pipelines(kind, pipeline, model, image):
    latents, expected = run_pipeline(pipeline, image)
    if kind is Kandinsky5I2VPipeline:
        # What it does after the last step, to the first frames, is no part of any training.
        adjusted = pipeline.normalize_first_frame(latents.movedim(1, -1)).movedim(-1, 1)
        assert (adjusted - latents)[:, :, :4].abs().max() > 1e-3 and torch.equal(adjusted[:, :, 4:], latents[:, :, 4:])
        latents = adjusted
    video = model.decode_latents(latents)
    assert video.shape == (1, 3, NUM_FRAMES, 32, 32)
    torch.testing.assert_close(video.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_rows_of_a_batch_have_texts_of_their_own_length(model, image, noise):
    both = model.encode_prompts([PROMPT, NEGATIVE])
    assert both.text_mask.sum(1).tolist() == [6, 2]
    sigma, x_t = torch.tensor([0.9, 0.4]), torch.cat([noise, -noise])
    with torch.no_grad():
        together = model.predict_velocity(x_t, sigma, condition(model, image, both))
        second = condition(model, image, model.encode_prompts([NEGATIVE]))
        alone = model.predict_velocity(x_t[1:], sigma[1:], second)
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


@pytest.fixture
def batch(model, image):
    """A clip whose first frame is the image, as a row of its own encoders."""
    encoders = model.encoders()
    rest = torch.rand(1, 3, NUM_FRAMES - 1, 32, 32, generator=torch.Generator().manual_seed(2))
    video = torch.cat([image[:, :, None], rest], dim=2)
    text = encoders.encode_prompts([PROMPT])
    texts = {"text_embedding": text.text, "text_mask": text.text_mask, **text.extras}
    return {"vae_latent": encoders.encode_video(video), **texts, **encoders.encode_images(video)}


def test_the_given_frame_is_the_images_and_has_no_loss(kind, model, batch, noise):
    clip = model.normalize_latents(batch["vae_latent"])
    prepared = model.prepare_batch(batch)
    if kind is Kandinsky5T2VPipeline:
        assert COLUMN not in batch and torch.equal(prepared.latents, clip)
        # Rows may carry the column for others.
        assert COLUMN not in model.prepare_batch({**batch, COLUMN: clip[:, :, :1]}).conditioning.extras
        return
    given = batch[COLUMN]
    assert (given - clip[:, :, :1]).abs().max() > 1e-3, "this VAE is not causal: a clip's first frame is another"
    assert torch.equal(prepared.conditioning.extras[COLUMN], given)
    assert torch.equal(prepared.latents, torch.cat([given, clip[:, :, 1:]], dim=2))
    sigma = torch.tensor([0.6])
    x_t = flow.add_noise(prepared.latents, noise, sigma)
    velocity = model.predict_velocity(x_t, sigma, prepared.conditioning)
    target = flow.velocity_target(prepared.latents, noise)
    torch.testing.assert_close(velocity[:, :, :1], target[:, :, :1], atol=1e-5, rtol=0)
    assert flow_matching_loss(velocity[:, :, 1:], target[:, :, 1:]) > 0.1


@pytest.mark.parametrize("kind", [Kandinsky5I2VPipeline], indirect=True)
def test_rows_without_the_column_give_their_clips_own_frame(model, batch):
    without = {name: value for name, value in batch.items() if name != COLUMN}
    clip = model.normalize_latents(batch["vae_latent"])
    prepared = model.prepare_batch(without)
    assert torch.equal(prepared.latents, clip) and torch.equal(prepared.conditioning.extras[COLUMN], clip[:, :, :1])
    image = {name: value for name, value in batch.items() if name != "vae_latent"} | {"latent_shape": SHAPE[1:]}
    prepared = model.prepare_batch(image, latents_source="zeros")
    assert prepared.latents.shape == SHAPE and torch.equal(prepared.conditioning.extras[COLUMN], batch[COLUMN])
    del image[COLUMN]
    with pytest.raises(ValueError, match="hold neither clips nor a first_frame_latent"):
        model.prepare_batch(image, latents_source="zeros")
    with pytest.raises(ValueError, match=r"has the shape \(4, 5, 4, 4\), but .* needs \(4, 1, 4, 4\)"):
        model.prepare_batch({**batch, COLUMN: clip})


def test_an_image_can_be_dropped(kind, model, image, noise):
    """As the policy `drop` has it for the unconditional pass."""
    text, sigma = model.prompt_conditioning(PROMPT), torch.tensor([0.6])
    with torch.no_grad():
        without = model.predict_velocity(noise, sigma, text)
        given = model.predict_velocity(noise, sigma, condition(model, image, text))
    assert torch.equal(without, given) is (kind is Kandinsky5T2VPipeline)


@pytest.mark.filterwarnings("ignore:std")
def test_clips_too_short_for_the_pipeline_are_refused(kind, pipeline, model, image):
    """With as few frames the image-to-video pipeline makes NaN."""
    short = (LATENT_CHANNELS, 4, 4, 4)
    latents, video = run_pipeline(pipeline, image, num_frames=13)
    assert latents.isfinite().all()
    if kind is Kandinsky5T2VPipeline:
        assert video.isfinite().all()
        model.check_latent_shape(short)
        return
    assert not video.isfinite().all()
    with pytest.raises(ValueError, match=r"makes NaN .* at least 17 frames \(5 latent frames\)"):
        model.check_latent_shape(short)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_number_of_given_frames_is_the_checkpoints(kind, directory, count):
    own = int(kind is Kandinsky5I2VPipeline)
    if count == own:
        assert Kandinsky5Model.from_pretrained(str(directory), condition_frames=count).fixed_given_frames == own
        return
    with pytest.raises(ValueError, match=f"condition_frames={count}, but .* is a {kind.__name__}"):
        Kandinsky5Model.from_pretrained(str(directory), condition_frames=count)


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
