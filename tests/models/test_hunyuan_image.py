"""HunyuanVideo image-to-video: what is given counts in no loss, and what is refused at the start."""

import json

import pytest
import tiny_runs
import torch
from encoded_rows import write_encoded_rows
from tiny_hunyuan import (
    IMAGE_TEXT_LENGTH,
    LATENT_CHANNELS,
    make_tiny_hunyuan_directory,
    make_tiny_hunyuan_i2v_directory,
    make_tiny_hunyuan_transformer,
)

from fv_distill.config import load_run_config
from fv_distill.estimate import Layout
from fv_distill.estimate.estimate import Device
from fv_distill.models import HunyuanVideoImageToVideoModel, HunyuanVideoModel, UncondPolicy, unconditional
from fv_distill.preprocess import PreprocessOptions, preprocess
from fv_distill.training.estimating import estimate_run

TARGET = "fv_distill.models.HunyuanVideoImageToVideoModel"
KINDS = ("token_replace", "latent_concat")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan")
    return {kind: make_tiny_hunyuan_i2v_directory(folder / kind, kind=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(directories):
    return {
        kind: HunyuanVideoImageToVideoModel.from_pretrained(str(path), text_length=IMAGE_TEXT_LENGTH, trainable=True)
        for kind, path in directories.items()
    }


@pytest.fixture(scope="module")
def rows(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {kind: write_encoded_rows(folder / kind, model) for kind, model in models.items()}


def make_batch(model):
    """Of two clips of noise."""
    encoders = model.encoders()
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    text = encoders.encode_clip_captions(["a digit", "the digit moving left"], video)
    columns = {"text_embedding": text.text, "text_mask": text.text_mask, **text.extras}
    return {**columns, "vae_latent": encoders.encode_video(video), **encoders.encode_images(video)}


def config_of(make, directory, rows, output):
    config = make(directory, rows, output)
    for role in config["models"].values():
        role["_target_"] = TARGET
    config["training"]["data"]["text_length"] = IMAGE_TEXT_LENGTH
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_frame_counts_in_no_loss(models, kind):
    """With token_replace; with latent_concat the first frame is generated like the others."""
    model = models[kind]
    batch = make_batch(model)
    prepared = model.prepare_batch(batch)
    generator = torch.Generator().manual_seed(1)
    noise, sigma = torch.randn(prepared.latents.shape, generator=generator), torch.tensor([0.9, 0.2])
    x_t = model.add_noise(prepared.latents, noise, sigma)
    velocity = model.predict_velocity(x_t, sigma, prepared.conditioning)
    error = (velocity - (noise - prepared.latents)).detach()
    is_given = kind == "token_replace"
    assert bool(error[:, :, 0].abs().max() < 1e-5) is is_given and error[:, :, 1:].abs().max() > 1e-2
    gradient = torch.autograd.grad(velocity[:, :, 0].sum(), model.transformer.proj_out.weight, allow_unused=True)[0]
    assert bool(gradient is None or gradient.abs().max() == 0) is is_given
    with torch.no_grad():
        x0 = model.predict_x0(x_t, sigma, prepared.conditioning)
        changed = x_t.clone()
        changed[:, :, 0] += 1
        elsewhere = model.predict_velocity(changed, sigma, prepared.conditioning) - velocity
    first = batch["first_frame_latent"]
    assert torch.allclose(x0[:, :, :1], first, atol=1e-4) is is_given
    # What stands in the given frame's place is not looked at.
    assert bool(elsewhere[:, :, 1:].abs().max() < 1e-6) is is_given
    begins_with_image = torch.equal(prepared.latents[:, :, :1], first)
    assert begins_with_image is is_given


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_counts(models, kind):
    model = models[kind]
    prepared = model.prepare_batch(make_batch(model))
    x_t, sigma = torch.randn(2, LATENT_CHANNELS, 3, 4, 4), torch.tensor([0.5, 0.5])
    found = {}
    with torch.no_grad():
        for name in ("keep", "zero", "drop")[: 2 if kind == "token_replace" else 3]:
            conditioning = unconditional(prepared.conditioning, UncondPolicy("keep", image=name), None)
            found[name] = model.predict_velocity(x_t, sigma, conditioning)[:, :, 1:]
    assert (found["keep"] - found["zero"]).abs().max() > 1e-4
    if "drop" in found:
        # The mask still says that there is a frame.
        assert (found["zero"] - found["drop"]).abs().max() > 1e-4


def test_networks_of_other_kinds_are_refused(tmp_path):
    check = HunyuanVideoImageToVideoModel.check_network
    with pytest.raises(ValueError, match="is a text-to-video HunyuanVideo; use fv_distill.models.HunyuanVideoModel"):
        check(make_tiny_hunyuan_transformer().config, tmp_path)
    with pytest.raises(ValueError, match="latent_concat, but its network reads 4 channels, not 9"):
        check(make_tiny_hunyuan_transformer(image_condition_type="latent_concat").config, tmp_path)


def test_a_clip_has_more_than_the_given_frame(models):
    for model in models.values():
        model.check_latent_shape((LATENT_CHANNELS, 2, 4, 4))
        with pytest.raises(ValueError, match="a single frame, which is given"):
            model.check_latent_shape((LATENT_CHANNELS, 1, 4, 4))
        with pytest.raises(ValueError, match=f"9 channels but .* takes {LATENT_CHANNELS}"):
            model.check_latent_shape((9, 2, 4, 4))


def test_a_text_length_without_room_for_a_prompt_is_refused(directories, tmp_path):
    message = "text_length=288 leaves no room for prompts: up to 288 tokens .* are an image's; set it to 288 plus"
    directory = str(directories["token_replace"])
    with pytest.raises(ValueError, match=message):
        HunyuanVideoImageToVideoModel.from_pretrained(directory, text_length=288)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/clip.mp4").touch()
    options = {"model": directory, "data": str(tmp_path / "data"), "num_frames": 9, "resolution": "32x32"}
    with pytest.raises(ValueError, match=message):
        preprocess(PreprocessOptions(**options, output=str(tmp_path / "rows"), text_length=288, device="cpu"))
    assert not (tmp_path / "rows").exists(), "so that another length is no change of options"


def test_rows_without_an_image_are_refused_at_the_start(directories, tmp_path):
    directory = make_tiny_hunyuan_directory(tmp_path / "model")
    other = write_encoded_rows(tmp_path / "rows", HunyuanVideoModel.from_pretrained(str(directory), text_length=8))
    config = config_of(tiny_runs.finetune_config, directories["token_replace"], other, tmp_path / "run")
    with pytest.raises(ValueError, match=r"have no first_frame_latent, which Hunyuan.*shape \(4, 1, 4, 4\)"):
        tiny_runs.train(config)


@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_an_unconditional_pass_without_the_given_frame_is_refused(directories, rows, tmp_path, policy):
    config = config_of(tiny_runs.dmd2_config, directories["token_replace"], rows["token_replace"], tmp_path / "run")
    config["method"]["cfg_uncond"] = {"image": policy}
    with pytest.raises(ValueError, match=f"method.cfg_uncond.image: {policy}, but a token_replace HunyuanVideo"):
        tiny_runs.train(config)


def test_roles_of_different_kinds_are_refused(directories, rows, tmp_path):
    config = config_of(tiny_runs.dmd2_config, directories["token_replace"], rows["token_replace"], tmp_path / "run")
    config["models"]["teacher"]["init_from"] = str(directories["latent_concat"])
    with pytest.raises(
        ValueError, match="models.teacher takes 0 latent frames for given, but the student 1; .* one kind"
    ):
        tiny_runs.train(config)


def test_a_directory_of_text_to_video_is_refused_before_anything_is_written(tmp_path):
    directory = make_tiny_hunyuan_directory(tmp_path / "model")
    index = json.loads((directory / "model_index.json").read_text())
    index["_class_name"] = "HunyuanVideoImageToVideoPipeline"
    (directory / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/clip.mp4").touch()
    options = PreprocessOptions(
        model=str(directory),
        data=str(tmp_path / "data"),
        output=str(tmp_path / "rows"),
        num_frames=9,
        resolution="32x32",
        text_length=IMAGE_TEXT_LENGTH,
        device="cpu",
    )
    with pytest.raises(ValueError, match="image_condition_type is None, which is neither latent_concat nor token_repl"):
        preprocess(options)
    assert not (tmp_path / "rows").exists()


def test_embedded_guidance_is_for_networks_that_read_it(directories, models):
    """latent_concat's network has none; its pipeline would warn of two guidances at once."""
    assert models["token_replace"].sampling_arguments(4.0)["guidance_scale"] == 6.0
    found = models["latent_concat"].sampling_arguments(4.0)
    assert (found["guidance_scale"], found["true_cfg_scale"]) == (1.0, 4.0)
    with pytest.raises(ValueError, match="embedded_guidance=3, but the network of .* reads no guidance scale"):
        HunyuanVideoImageToVideoModel.from_pretrained(
            str(directories["latent_concat"]), text_length=IMAGE_TEXT_LENGTH, embedded_guidance=3.0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_counts_the_network(directories, models, rows, tmp_path, kind):
    config = config_of(tiny_runs.dmd2_config, directories[kind], rows[kind], tmp_path / "run")
    path = tiny_runs.write_config(config, tmp_path / "estimate.yaml")
    found = estimate_run(load_run_config(path), Layout(), Device("GPU", None, None, 0.4))
    count = sum(parameter.numel() for parameter in models[kind].transformer.parameters())
    assert {role.parameters for role in found.roles} == {count} and found.flops_per_step > 0
