"""Cosmos: prompts without a text encoder, given frames, and what is refused at the start."""

import shutil

import pytest
import tiny_runs
import torch
from safetensors.torch import save_file
from tiny_cosmos import (
    LATENT_CHANNELS,
    TEXT_DIM,
    make_tiny_cosmos2_directory,
    make_tiny_cosmos_directory,
    make_tiny_cosmos_transformer,
)
from tiny_models import TEXT_LENGTH

from fv_distill.config import load_run_config
from fv_distill.data import write_rows
from fv_distill.estimate import Layout
from fv_distill.estimate.estimate import Device
from fv_distill.export.scheduler import few_step_scheduler_for
from fv_distill.models import Conditioning, CosmosModel
from fv_distill.training.estimating import estimate_run

TARGET = "fv_distill.models.CosmosModel"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_cosmos_directory(tmp_path_factory.mktemp("cosmos") / "model")


@pytest.fixture(scope="module")
def predict2(tmp_path_factory):
    return make_tiny_cosmos2_directory(tmp_path_factory.mktemp("cosmos2") / "model")


@pytest.fixture(scope="module")
def without_encoder(directory, tmp_path_factory):
    """What a user has whose embeddings were made elsewhere."""
    path = tmp_path_factory.mktemp("without") / "model"
    shutil.copytree(directory, path, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")
    generator = torch.Generator().manual_seed(0)
    row = {
        "caption": "a digit",
        "num_frames": 9,
        "vae_latent": torch.randn(LATENT_CHANNELS, 3, 4, 4, generator=generator),
        "text_embedding": torch.randn(TEXT_LENGTH, TEXT_DIM, generator=generator),
    }
    write_rows(path / "rows.parquet", [row] * 4)
    return path


def run_config(make, model, rows, output, **options):
    config = make(model, rows, output)
    for role in config["models"].values():
        role |= {"_target_": TARGET, **options}
    config["training"]["loop"]["max_train_steps"] = 2
    return config


def test_guidance_without_a_real_negative_embedding_is_refused_at_the_start(without_encoder, rows, tmp_path):
    config = run_config(tiny_runs.dmd2_config, without_encoder, rows, tmp_path / "run")
    with pytest.raises(ValueError, match=r"no embedding of the prompt 'bad'.* zeros are no text.*prompt_embeddings"):
        tiny_runs.train(config)
    config["method"]["cfg_uncond"] = {"text": "zero"}
    with pytest.raises(ValueError, match=r"method.cfg_uncond.text: zero, but Cosmos was not trained on zeros"):
        tiny_runs.train(config)
    config["method"] |= {"real_score_guidance_scale": 1.0}
    assert len(tiny_runs.metrics(tiny_runs.train(config))) == 2


def test_caption_dropout_without_an_empty_embedding_is_refused_at_the_start(without_encoder, rows, tmp_path):
    config = run_config(tiny_runs.finetune_config, without_encoder, rows, tmp_path / "run")
    config["training"]["data"]["caption_dropout"] = 0.1
    with pytest.raises(ValueError, match="no embedding of the prompt ''.*training.data.caption_dropout"):
        tiny_runs.train(config)
    config["training"]["data"]["caption_dropout"] = 0.0
    assert len(tiny_runs.metrics(tiny_runs.train(config))) == 2


def test_given_embeddings_take_the_text_encoders_place(directory, without_encoder, rows, tmp_path):
    own = CosmosModel.from_pretrained(str(directory), text_length=TEXT_LENGTH).encode_prompts(["", "bad"])
    file = tmp_path / "prompts.safetensors"
    save_file({"": own.text[0].clone(), "bad": own.text[1].clone()}, file)
    options = {"text_length": TEXT_LENGTH, "prompt_embeddings": str(file)}
    given = CosmosModel.from_pretrained(str(without_encoder), **options).encode_prompts(["", "bad"])
    assert torch.equal(given.text, own.text) and torch.equal(given.text_mask, own.text_mask)
    config = run_config(tiny_runs.dmd2_config, without_encoder, rows, tmp_path / "run", prompt_embeddings=str(file))
    config["training"]["data"]["caption_dropout"] = 0.5
    assert len(tiny_runs.metrics(tiny_runs.train(config))) == 2
    with pytest.raises(FileNotFoundError, match="no such file"):
        CosmosModel.from_pretrained(str(without_encoder), prompt_embeddings=str(tmp_path / "none"))
    save_file({"": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"not \[L, D\]"):
        CosmosModel.from_pretrained(str(without_encoder), prompt_embeddings=str(file))


def test_text_that_was_not_padded_before_it_was_encoded_is_refused(directory, predict2):
    model = CosmosModel.from_pretrained(str(directory), text_length=TEXT_LENGTH)
    model.check_text((TEXT_LENGTH, TEXT_DIM))
    with pytest.raises(ValueError, match="attends to the padding"):
        model.check_text((TEXT_LENGTH - 1, TEXT_DIM))
    with pytest.raises(ValueError, match=f"whose text is {TEXT_DIM} wide"):
        model.check_text((TEXT_LENGTH, 16))
    # T5's padding is zeros, which the loader puts on.
    CosmosModel.from_pretrained(str(predict2), text_length=TEXT_LENGTH).check_text((3, 16))


def test_other_networks_are_refused(directory, tiny_wan, monkeypatch):
    config = make_tiny_cosmos_transformer().config
    CosmosModel.check_network(config, directory)
    with pytest.raises(ValueError, match="is a WanPipeline; of Cosmos, Predict2.5 and Predict2 Video2World"):
        CosmosModel.check_network(config, tiny_wan)
    with pytest.raises(ValueError, match="in_channels=4 are not the latents and a condition mask"):
        CosmosModel.check_network(make_tiny_cosmos_transformer(in_channels=4).config, directory)
    monkeypatch.delattr("diffusers.models.transformers.transformer_cosmos.transforms")
    with pytest.raises(ValueError, match="needs torchvision"):
        CosmosModel.check_network(config, directory)


def batch_of(model, latents):
    text = model.encode_prompts(["a digit"] * len(latents))
    return {"text_embedding": text.text, "text_mask": text.text_mask, "vae_latent": latents}


@torch.no_grad()
def test_given_frames_are_part_of_a_batch_and_cost_nothing(directory):
    model = CosmosModel.from_pretrained(str(directory), text_length=TEXT_LENGTH, condition_frames=1)
    latents = torch.randn(2, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prepared = model.prepare_batch(batch_of(model, latents))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.9, 0.2])
    x_t = model.add_noise(prepared.latents, noise, sigma)
    velocity = model.predict_velocity(x_t, sigma, prepared.conditioning)
    target = noise - prepared.latents
    torch.testing.assert_close(velocity[:, :, :1], target[:, :, :1], atol=1e-5, rtol=0)
    assert (velocity - target)[:, :, 1:].abs().mean() > 0.1
    # A method that starts from noise takes them from the same clip, and rows without clips from their own column.
    zeros = model.prepare_batch(batch_of(model, latents), latents_source="zeros")
    assert torch.equal(zeros.conditioning.extras["first_frame_latent"], prepared.latents[:, :, :1])
    rows = batch_of(model, latents)
    del rows["vae_latent"]
    rows |= {"first_frame_latent": prepared.latents[:, :, :1], "latent_shape": latents.shape[1:]}
    own = model.prepare_batch(rows, latents_source="zeros").conditioning
    assert torch.equal(own.extras["first_frame_latent"], prepared.latents[:, :, :1])
    # `cfg_uncond.image: drop` is Text2World.
    dropped = Conditioning(own.text, own.text_mask)
    free = CosmosModel.from_pretrained(str(directory), text_length=TEXT_LENGTH)
    assert torch.equal(model.predict_velocity(x_t, sigma, dropped), free.predict_velocity(x_t, sigma, dropped))


def test_what_is_wrong_with_given_frames_is_said(directory):
    model = CosmosModel.from_pretrained(str(directory), text_length=TEXT_LENGTH, condition_frames=2)
    with pytest.raises(ValueError, match="condition_frames=2 leaves nothing to generate of 2"):
        model.check_latent_shape((LATENT_CHANNELS, 2, 4, 4))
    rows = batch_of(model, torch.zeros(1, LATENT_CHANNELS, 3, 4, 4))
    del rows["vae_latent"]
    with pytest.raises(ValueError, match="neither clips nor a first_frame_latent of the shape"):
        model.prepare_batch(rows | {"latent_shape": (LATENT_CHANNELS, 3, 4, 4)}, latents_source="zeros")
    with pytest.raises(ValueError, match="condition_frames=-1"):
        CosmosModel.from_pretrained(str(directory), condition_frames=-1)
    with pytest.raises(ValueError, match="fps=0 must be positive"):
        CosmosModel.from_pretrained(str(directory), fps=0)


@torch.no_grad()
def test_fps_scales_positions_in_time(directory):
    noise = torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    models = [CosmosModel.from_pretrained(str(directory), text_length=TEXT_LENGTH, fps=fps) for fps in (None, 24, 10)]
    text = models[0].encode_prompts(["a digit"])
    unscaled, same, other = (model.predict_velocity(noise, torch.ones(1), text) for model in models)
    # 24 is what positions are counted in.
    torch.testing.assert_close(same, unscaled)
    assert (other - unscaled).abs().max() > 1e-4


def test_guidance_is_called_otherwise_by_the_pipelines(directory):
    model = CosmosModel.from_pretrained(str(directory))
    assert model.sampling_arguments(None) == {}
    assert model.sampling_arguments(1.0) == {"guidance_scale": 1.0}
    assert model.sampling_arguments(8.0) == {"guidance_scale": 7.0}


def test_a_few_step_predict2_can_not_be_sampled_by_its_pipeline(directory, predict2):
    assert few_step_scheduler_for(directory, (1.0, 0.5)).config.shift_terminal == 0.5
    with pytest.raises(ValueError, match="is a Cosmos2VideoToWorldPipeline, which samples at EDM's noise levels"):
        few_step_scheduler_for(predict2, (1.0, 0.5))


@pytest.mark.parametrize("preset", ["attention", "all", "linear"])
def test_lora_presets_name_layers_that_are_there(directory, preset):
    model = CosmosModel.from_pretrained(str(directory))
    names = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = CosmosModel.lora_presets[preset]
    for target in targets:
        assert any(name == target or name.endswith(f".{target}") for name in names), target
    if preset == "linear":
        left_out = [name for name in names if not f".{name}".endswith(tuple(f".{target}" for target in targets))]
        assert left_out == ["patch_embed.proj"]


def test_the_estimate_counts_the_network_and_its_wide_text(directory, rows, tmp_path):
    config = run_config(tiny_runs.finetune_config, directory, rows, tmp_path / "run")
    path = tiny_runs.write_config(config, tmp_path / "estimate.yaml")
    found = estimate_run(load_run_config(path), Layout(), Device("GPU", None, None, 0.4))
    count = sum(parameter.numel() for parameter in make_tiny_cosmos_transformer().parameters())
    assert found.roles[0].parameters == count
    assert found.clip.text == (TEXT_LENGTH, TEXT_DIM)
