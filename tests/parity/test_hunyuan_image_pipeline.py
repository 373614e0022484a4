"""One denoising step of diffusers' HunyuanVideoImageToVideoPipeline against the adapter's, of both its networks."""

import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from diffusers.image_processor import VaeImageProcessor
from euler import euler
from tiny_hunyuan import FLOW_SHIFT, IMAGE_TEXT_LENGTH, LATENT_CHANNELS, make_tiny_hunyuan_i2v_directory

from fv_distill.models import HunyuanVideoImageToVideoModel

PROMPT, NEGATIVE = "a handwritten digit moving left", "bad"
EMBEDDED_GUIDANCE = 4.0
# Tokens of the image: every second or fourth of 576.
IMAGE_TOKENS = {"latent_concat": 288, "token_replace": 144}
# The pipeline's start is this much noise and the rest of the image, in every frame.
START = 0.999


@pytest.fixture(scope="module", params=IMAGE_TOKENS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def directory(kind, tmp_path_factory):
    return make_tiny_hunyuan_i2v_directory(tmp_path_factory.mktemp("hunyuan") / kind, kind=kind)


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = HunyuanVideoImageToVideoPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(kind, directory):
    return HunyuanVideoImageToVideoModel.from_pretrained(
        str(directory),
        negative_prompt=NEGATIVE,
        text_length=IMAGE_TEXT_LENGTH,
        # latent_concat reads none.
        embedded_guidance=EMBEDDED_GUIDANCE if kind == "token_replace" else None,
    )


@pytest.fixture(scope="module")
def video():
    """Whole steps of a picture file's 255, so that pipeline and adapter see the same pixels."""
    return torch.randint(0, 256, (1, 3, 9, 32, 32), generator=torch.Generator().manual_seed(1)) / 255


@pytest.fixture(scope="module")
def image(video):
    (image,) = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(video[:, :, 0]))
    return image


@pytest.fixture(scope="module")
def batch(model, video):
    """As the data loader makes it of a row that `fv-distill preprocess` has written."""
    encoders = model.encoders()
    text = encoders.encode_clip_captions([PROMPT], video)
    columns = {"text_embedding": text.text, "text_mask": text.text_mask, **text.extras}
    return {**columns, "vae_latent": encoders.encode_video(video), **encoders.encode_images(video)}


@pytest.fixture
def noise():
    return torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def run_pipeline(pipeline, image, noise, *, true_cfg_scale=1.0, steps=1, output_type="latent"):
    """All latent frames, of which `latent_concat`'s pipeline returns those after the first, and what it returns."""
    states = []

    def keep(pipeline, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    frames = pipeline(
        image,
        PROMPT,
        negative_prompt=NEGATIVE,
        height=32,
        width=32,
        num_frames=9,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=EMBEDDED_GUIDANCE,
        true_cfg_scale=true_cfg_scale,
        # Padding takes no part in the output.
        max_sequence_length=IMAGE_TEXT_LENGTH - 100,
        callback_on_step_end=keep,
        output_type=output_type,
    ).frames
    return states[-1], frames


def run_adapter(model, pipeline, batch, noise, *, scale=1.0):
    positive, negative = model.prepare_batch(batch).conditioning, model.negative_conditioning()
    negative = type(positive)(negative.text, negative.text_mask, {**positive.extras, **negative.extras})
    x_t = START * noise + (1 - START) * batch["first_frame_latent"]
    return euler(model, x_t, pipeline.scheduler.sigmas, positive, negative, scale=scale)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising_equals_the_pipelines(pipeline, model, image, batch, noise, scale, steps):
    """With guidance the unconditional pass reads the negative prompt beside a black image, and sees the same frame."""
    expected, _ = run_pipeline(pipeline, image, noise, true_cfg_scale=scale, steps=steps)
    actual = run_adapter(model, pipeline, batch, noise, scale=scale)
    assert (expected - noise).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_first_frame_is_given_or_generated(kind, pipeline, model, image, batch, noise):
    states, returned = run_pipeline(pipeline, image, noise)
    is_given = torch.allclose(states[:, :, :1], batch["first_frame_latent"], atol=1e-5)
    assert is_given is (kind == "token_replace")
    assert model.fixed_given_frames == int(is_given)
    assert returned.shape[2] == (3 if is_given else 2)


def test_text_equals_the_pipelines(kind, pipeline, model, image, video, batch):
    interleave = {"latent_concat": 2, "token_replace": 4}[kind]
    text, pooled, mask = pipeline.encode_prompt(
        image=image, prompt=PROMPT, max_sequence_length=20, image_embed_interleave=interleave
    )
    count = int(mask.sum())
    assert count == IMAGE_TOKENS[kind] + 6, "the prompt's five words and the end"
    assert batch["text_embedding"].shape == (1, IMAGE_TEXT_LENGTH, 16) and int(batch["text_mask"].sum()) == count
    torch.testing.assert_close(batch["text_embedding"][:, :count], text[:, :count], atol=1e-5, rtol=0)
    torch.testing.assert_close(batch["pooled_text_embedding"], pooled, atol=1e-5, rtol=0)
    assert batch["text_embedding"][:, count:].abs().max() == 0
    other = model.encoders().encode_clip_captions([PROMPT], 1 - video)
    assert (other.text[:, :count] - text[:, :count]).abs().max() > 1e-4, "it is the clip's own"


def test_captions_of_a_batch_do_not_see_each_other(model, video):
    """One of which is longer than there is room for."""
    encoders = model.encoders()
    captions, videos = [PROMPT, "left " * IMAGE_TEXT_LENGTH], torch.cat([video, 1 - video])
    together = encoders.encode_clip_captions(captions, videos)
    assert together.text.shape == (2, IMAGE_TEXT_LENGTH, 16) and bool(together.text_mask[1].all())
    for index, caption in enumerate(captions):
        alone = encoders.encode_clip_captions([caption], videos[index : index + 1])
        torch.testing.assert_close(together.row(index).text, alone.text, atol=1e-5, rtol=0)


def test_a_sampled_prompt_is_cut_off_where_a_caption_was(kind, pipeline, model, image, video):
    caption = "left " * IMAGE_TEXT_LENGTH
    text, _, mask = pipeline.encode_prompt(
        image=image,
        prompt=caption,
        max_sequence_length=model.sampling_arguments(None)["max_sequence_length"],
        image_embed_interleave={"latent_concat": 2, "token_replace": 4}[kind],
    )
    assert text.shape == (1, IMAGE_TEXT_LENGTH, 16) and bool(mask.all())
    encoded = model.encoders().encode_clip_captions([caption], video)
    torch.testing.assert_close(encoded.text, text, atol=1e-5, rtol=0)


def test_latents_of_an_image_are_not_those_that_its_clip_begins_with(model, batch):
    """The VAE's group norms see the whole clip; the adapter takes the image's, as the pipeline does."""
    first = model.normalize_latents(batch["vae_latent"])[:, :, :1]
    assert (first - batch["first_frame_latent"]).abs().max() > 1e-3
    prepared = model.prepare_batch(batch)
    assert torch.equal(prepared.conditioning.extras["first_frame_latent"], batch["first_frame_latent"])


def test_decoded_video_equals_the_pipelines(kind, pipeline, model, image, noise):
    states, expected = run_pipeline(pipeline, image, noise, output_type="pt")
    video = model.decode_latents(states).transpose(1, 2)
    # Frames of the first two latents, which `latent_concat`'s pipeline leaves out.
    left_out = {"latent_concat": 4, "token_replace": 0}[kind]
    torch.testing.assert_close(video[:, left_out:], expected, atol=1e-5, rtol=0)


def test_flow_shift_is_read_from_the_directory(model):
    assert model.flow_shift == FLOW_SHIFT
