import pytest
import torch
from tiny_longcat import make_tiny_longcat_directory
from tiny_models import LATENT_CHANNELS, TEXT_LENGTH

from fv_distill.models import LongCatVideoModel


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_tiny_longcat_directory(tmp_path_factory.mktemp("longcat") / "published", published=True)


@pytest.fixture(scope="module")
def model(published):
    return LongCatVideoModel.from_pretrained(str(published), text_length=TEXT_LENGTH)


@pytest.fixture(scope="module")
def continuing(published):
    """Two of three latent frames are given."""
    return LongCatVideoModel.from_pretrained(str(published), text_length=TEXT_LENGTH, condition_frames=2)


def test_sigma_per_frame_equals_sigma_per_sample_when_constant(model, batch):
    prepared, sigma = model.prepare_batch(batch), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        per_sample = model.predict_velocity(prepared.latents, sigma, prepared.conditioning)
        per_frame = model.predict_velocity(prepared.latents, sigma[:, None].expand(2, 3), prepared.conditioning)
        other = model.predict_velocity(prepared.latents, torch.tensor([[0.3, 0.5, 0.9]] * 2), prepared.conditioning)
    torch.testing.assert_close(per_frame, per_sample, atol=1e-5, rtol=0)
    assert (other - per_sample).abs().max() > 1e-4


@pytest.mark.parametrize("per_frame", [False, True])
def test_given_frames_are_what_x0_is_there(continuing, batch, per_frame):
    model = continuing
    prepared, sigma = model.prepare_batch(batch), torch.tensor([0.3, 0.8])
    levels = sigma[:, None].expand(2, 3) if per_frame else sigma
    x_t = torch.randn_like(prepared.latents)
    with torch.no_grad():
        x0 = model.predict_x0(x_t, levels, prepared.conditioning)
        torch.testing.assert_close(x0[:, :, :2], prepared.latents[:, :, :2], atol=1e-5, rtol=0)
        # The network doesn't see what x_t has there, and sees what is given.
        changed = x_t.clone()
        changed[:, :, :2] += 1.0
        torch.testing.assert_close(model.predict_x0(changed, levels, prepared.conditioning), x0, atol=1e-5, rtol=0)
        other = model.prepare_batch(batch | {"vae_latent": batch["vae_latent"] + 1.0})
        assert (model.predict_x0(x_t, levels, other.conditioning) - x0)[:, :, 2:].abs().max() > 1e-3


def test_flow_matching_has_no_loss_on_frames_that_are_given(continuing, batch):
    prepared = continuing.prepare_batch(batch)
    noise, sigma = torch.randn_like(prepared.latents), torch.tensor([0.002, 0.9])
    x_t = continuing.add_noise(prepared.latents, noise, sigma)
    with torch.no_grad():
        velocity = continuing.predict_velocity(x_t, sigma, prepared.conditioning)
    error = (velocity - (noise - prepared.latents)).abs()
    assert error[:, :, :2].max() < 1e-3 and error[:, :, 2:].mean() > 0.1


def test_given_frames_come_from_clips_or_from_their_column(model, continuing, batch):
    clip = batch["vae_latent"]
    expected = continuing.normalize_latents(clip[:, :, :2])
    column = batch | {"first_frame_latent": expected}
    for rows in (batch, column):
        assert torch.equal(continuing.prepare_batch(rows).conditioning.extras["first_frame_latent"], expected)
    # Rows may carry the column for others.
    assert not model.prepare_batch(column).conditioning.extras
    del column["vae_latent"]
    column["latent_shape"] = tuple(clip.shape[1:])
    prepared = continuing.prepare_batch(column, latents_source="zeros")
    assert torch.equal(prepared.conditioning.extras["first_frame_latent"], expected)
    paths = torch.stack([torch.randn_like(clip), continuing.normalize_latents(clip)], dim=1)
    of_paths = {**column, "trajectory_latents": paths}
    del of_paths["first_frame_latent"]
    prepared = continuing.prepare_batch(of_paths, latents_source="zeros")
    assert torch.equal(prepared.conditioning.extras["first_frame_latent"], expected)
    with pytest.raises(ValueError, match="neither clips nor a first_frame_latent of the shape"):
        continuing.prepare_batch(column | {"first_frame_latent": clip[:, :, :1]}, latents_source="zeros")


def test_given_frames_that_leave_nothing_are_refused(published, continuing):
    with pytest.raises(ValueError, match="leaves nothing to generate of 2 latent frames"):
        continuing.check_latent_shape((LATENT_CHANNELS, 2, 4, 4))
    with pytest.raises(ValueError, match="condition_frames=-1"):
        LongCatVideoModel.from_pretrained(str(published), condition_frames=-1)


def test_a_video_goes_to_latents_and_back(model, batch):
    video = model.decode_latents(model.normalize_latents(batch["vae_latent"]))
    encoders = model.encoders()
    latents = encoders.encode_video(video)
    assert latents.shape == batch["vae_latent"].shape and latents.dtype == torch.float32
    torch.testing.assert_close(model.raw_latents(model.normalize_latents(latents)), latents)
    # The VAE is causal: a first frame alone has the clip's first latents.
    torch.testing.assert_close(encoders.encode_video(video[:, :, :1]), latents[:, :, :1], atol=1e-4, rtol=0)


def test_prompts_are_padded_with_zeros_and_masked(model):
    conditioning = model.encode_prompts(["a digit", " a handwritten&nbsp;digit  moving left"])
    assert conditioning.text_mask.sum(1).tolist() == [3, 6]
    assert conditioning.text[0, 3:].abs().max() == 0
    torch.testing.assert_close(
        conditioning.text[:1, :3], model.encoders().encode_prompts(["a  digit"]).text[:, :3], atol=1e-6, rtol=0
    )


def test_lora_presets_match_the_layers_they_name(published):
    for preset, per_block, others in (("attention", 5, 0), ("all", 8, 0), ("linear", 9, 6)):
        model = LongCatVideoModel.from_pretrained(str(published))
        model.add_lora("student", rank=2, target_modules=preset)
        adapted = [name for name, _ in model.transformer.named_modules() if name.endswith(".lora_A")]
        assert len(adapted) == 2 * per_block + others, preset


def test_a_lora_on_a_float32_layer_is_used(published, batch):
    model = LongCatVideoModel.from_pretrained(str(published), dtype="bfloat16", text_length=TEXT_LENGTH)
    model.add_lora("student", rank=2, target_modules="linear")
    prepared = model.prepare_batch(batch)
    model.predict_velocity(prepared.latents, torch.ones(2), prepared.conditioning).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.transformer.named_parameters() if "lora_B" in name}
    assert len(gradients) == 24 and all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("shape", "message"), [((5, 3, 4, 4), "5 channels"), ((4, 3, 5, 4), "H=5"), ((4, 3), "expected")]
)
def test_shapes_that_do_not_fit_are_explained(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.check_latent_shape(shape)
    with pytest.raises(ValueError, match="caption_channels"):
        model.check_text((3, 7))


def test_a_repository_of_another_network_is_no_model(tmp_path):
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit/config.json").write_text('{"_class_name": "SomethingElse"}')
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        LongCatVideoModel.from_pretrained(str(tmp_path))
