"""HunyuanVideo and HunyuanVideo 1.5: what is refused at the start, embedded guidance, sizes and exports."""

import json
from dataclasses import replace

import pytest
import tiny_runs
import torch
from encoded_rows import write_encoded_rows
from tiny_hunyuan import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    make_tiny_hunyuan15_directory,
    make_tiny_hunyuan15_i2v_directory,
    make_tiny_hunyuan15_transformer,
    make_tiny_hunyuan_directory,
    make_tiny_hunyuan_i2v_directory,
    make_tiny_hunyuan_transformer,
)
from tiny_models import TEXT_LENGTH

from fv_distill.config import load_run_config
from fv_distill.data import write_rows
from fv_distill.estimate import Layout
from fv_distill.estimate.estimate import Device
from fv_distill.export.call_arguments import training_call_arguments
from fv_distill.export.guider import set_guider
from fv_distill.export.scheduler import few_step_scheduler, few_step_scheduler_for
from fv_distill.models import (
    HunyuanVideo15Model,
    HunyuanVideoImageToVideoModel,
    HunyuanVideoModel,
    UncondPolicy,
    unconditional,
)
from fv_distill.schedules import few_step_sigmas
from fv_distill.training.estimating import estimate_run

TARGET = "fv_distill.models.HunyuanVideoModel"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_hunyuan_directory(tmp_path_factory.mktemp("hunyuan") / "model")


@pytest.fixture(scope="module")
def directory15(tmp_path_factory):
    return make_tiny_hunyuan15_directory(tmp_path_factory.mktemp("hunyuan15") / "model")


def finetune_config(model, rows, output, target=TARGET):
    config = tiny_runs.finetune_config(model, rows, output)
    config["models"]["student"]["_target_"] = target
    return config


@torch.no_grad()
def velocity(model):
    noise = torch.randn(1, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return model.predict_velocity(noise, torch.tensor([0.7]), model.prompt_conditioning("a digit"))


def test_the_embedded_guidance_is_an_input_and_a_key(directory):
    models = [
        HunyuanVideoModel.from_pretrained(str(directory), text_length=TEXT_LENGTH, embedded_guidance=scale)
        for scale in (6.0, 1.0)
    ]
    assert (velocity(models[0]) - velocity(models[1])).abs().max() > 1e-4
    assert models[0].sampling_arguments(None) == {"guidance_scale": 6.0}
    assert models[1].sampling_arguments(1.0) == {"guidance_scale": 1.0, "true_cfg_scale": 1.0}
    on_base = HunyuanVideoModel.on_base(models[0], embedded_guidance=3.0)
    assert on_base.embedded_guidance == 3.0
    with pytest.raises(ValueError, match="embedded_guidance=0 must be positive"):
        HunyuanVideoModel.from_pretrained(str(directory), embedded_guidance=0)


def test_a_network_without_guidance_embedding_gets_none(directory):
    transformer = make_tiny_hunyuan_transformer(guidance_embeds=False)
    options = {"directory": directory, "flow_shift": FLOW_SHIFT, "text_length": TEXT_LENGTH}
    model = HunyuanVideoModel(transformer, **options)
    assert velocity(model).isfinite().all() and model.sampling_arguments(None) == {"guidance_scale": 1.0}
    with pytest.raises(ValueError, match="embedded_guidance=1, but the network of .* reads no guidance scale"):
        HunyuanVideoModel(transformer, **options, embedded_guidance=1.0)


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_image_to_video_networks_have_their_own_adapter(directory, kind):
    config = make_tiny_hunyuan_transformer(image_condition_type=kind).config
    with pytest.raises(ValueError, match=f"image-to-video HunyuanVideo .*{kind}.*use .*ImageToVideoModel"):
        HunyuanVideoModel.check_network(config, directory)


def test_other_networks_of_1_5_are_refused(directory, directory15):
    HunyuanVideo15Model.check_network(make_tiny_hunyuan15_transformer(task_type="i2v").config, directory15)
    with pytest.raises(ValueError, match="use_meanflow"):
        HunyuanVideo15Model.check_network(make_tiny_hunyuan15_transformer(use_meanflow=True).config, directory15)
    with pytest.raises(ValueError, match="in_channels=4"):
        HunyuanVideo15Model.check_network(make_tiny_hunyuan15_transformer(in_channels=4).config, directory15)
    with pytest.raises(ValueError, match="is a HunyuanVideoPipeline"):
        HunyuanVideo15Model.check_network(make_tiny_hunyuan15_transformer().config, directory)


def test_latents_are_scaled_and_shapes_checked(directory, directory15):
    for kind, path, scale, spatial in (
        (HunyuanVideoModel, directory, 0.476986, 8),
        (HunyuanVideo15Model, directory15, 1.03682, 16),
    ):
        model = kind.from_pretrained(str(path))
        latents = torch.ones(1, LATENT_CHANNELS, 3, 4, 4)
        torch.testing.assert_close(model.normalize_latents(latents), scale * latents)
        torch.testing.assert_close(model.raw_latents(model.normalize_latents(latents)), latents)
        model.check_latent_shape((LATENT_CHANNELS, 3, 4, 4), num_frames=9)
        with pytest.raises(ValueError, match="3 latent frames are 9 frames"):
            model.check_latent_shape((LATENT_CHANNELS, 3, 4, 4), num_frames=10)
        with pytest.raises(ValueError, match=f"5 channels but .* takes {LATENT_CHANNELS}"):
            model.check_latent_shape((5, 3, 4, 4))
        with pytest.raises(ValueError, match="text_embed_dim is 16"):
            model.check_text((7, 12))
        with pytest.raises(ValueError, match="can't share a clip's tokens"):
            model.check_context_parallel(2, (LATENT_CHANNELS, 3, 4, 4))
        call = training_call_arguments(path, (LATENT_CHANNELS, 3, 4, 4), text_length=8)
        assert (call["height"], call["num_frames"]) == (4 * spatial, 9)
        # The pipeline of 1.5 has no such argument.
        assert ("max_sequence_length" in call) == (kind is HunyuanVideoModel)


def test_odd_heights_do_not_fit_patches(directory):
    with pytest.raises(ValueError, match="H=5 does not divide by the patch size 2"):
        HunyuanVideoModel.from_pretrained(str(directory)).check_latent_shape((LATENT_CHANNELS, 3, 5, 4))


@pytest.mark.parametrize("preset", ["attention", "all", "linear"])
def test_lora_presets_name_layers_that_are_there(directory, directory15, preset, tmp_path):
    image = make_tiny_hunyuan_i2v_directory(tmp_path / "image")
    kinds = (HunyuanVideoModel, directory), (HunyuanVideo15Model, directory15), (HunyuanVideoImageToVideoModel, image)
    for kind, path in kinds:
        model = kind.from_pretrained(str(path))
        names = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in kind.lora_presets[preset]:
            assert any(name == target or name.endswith(f".{target}") for name in names), target
        if preset == "linear":
            targets = tuple(f".{target}" for target in kind.lora_presets[preset])
            assert [name for name in names if not f".{name}".endswith(targets)] == []


def test_rows_without_the_second_text_are_refused_at_the_start(directory, tmp_path):
    row = {
        "caption": "a digit",
        "num_frames": 9,
        "vae_latent": torch.zeros(LATENT_CHANNELS, 3, 4, 4),
        "text_embedding": torch.zeros(3, 16),
    }
    write_rows(tmp_path / "rows/rows.parquet", [row, row])
    with pytest.raises(ValueError, match="have no pooled_text_embedding, which HunyuanVideoModel of .* is conditioned"):
        tiny_runs.train(finetune_config(directory, tmp_path / "rows", tmp_path / "run"))


def test_rows_without_an_image_are_refused_at_the_start(directory15, tmp_path):
    directory = make_tiny_hunyuan15_i2v_directory(tmp_path / "i2v")
    text_only = HunyuanVideo15Model.from_pretrained(str(directory15), text_length=TEXT_LENGTH)
    rows = write_encoded_rows(tmp_path / "rows", text_only)
    with pytest.raises(ValueError, match=r"have no clip_feature, which HunyuanVideo15Model .*shape \(4, 6\)"):
        tiny_runs.train(finetune_config(directory, rows, tmp_path / "run", "fv_distill.models.HunyuanVideo15Model"))


def test_the_image_goes_where_an_unconditional_pass_wants_it(tmp_path):
    model = HunyuanVideo15Model.from_pretrained(
        str(make_tiny_hunyuan15_i2v_directory(tmp_path / "i2v")), text_length=TEXT_LENGTH
    )
    text = model.encode_prompts(["a digit"])
    frame, feature = torch.ones(1, LATENT_CHANNELS, 1, 2, 2), torch.ones(1, 4, 6)
    own = replace(text, extras={**text.extras, "first_frame_latent": frame, "clip_feature": feature})
    x_t, sigma = torch.randn(1, LATENT_CHANNELS, 3, 2, 2), torch.tensor([0.5])
    policies = {name: unconditional(own, UncondPolicy("keep", image=name), None) for name in ("keep", "zero", "drop")}
    with torch.no_grad():
        found = {name: model.predict_velocity(x_t, sigma, value) for name, value in policies.items()}
        assert torch.equal(found["drop"], model.predict_velocity(x_t, sigma, text))
    assert (found["keep"] - found["drop"]).abs().max() > 1e-4
    # The mask still says that there is a frame.
    assert (found["zero"] - found["drop"]).abs().max() > 1e-4


def test_a_noise_level_per_chunk_is_refused_at_the_start(directory, tiny_rows, tmp_path):
    config = finetune_config(directory, tiny_rows, tmp_path / "run")
    config["method"] = {"_target_": "fv_distill.methods.DiffusionForcingSFTMethod", "chunk_size": 1}
    with pytest.raises(ValueError, match="HunyuanVideoModel has one time embedding for the whole clip"):
        tiny_runs.train(config)


def test_misspelt_keys_are_found(directory, tiny_rows, tmp_path):
    config = finetune_config(directory, tiny_rows, tmp_path / "run")
    config["models"]["student"]["embeded_guidance"] = 1.0
    with pytest.raises(ValueError, match="embedded_guidance"):
        tiny_runs.train(config)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("warp", [True, False])
def test_the_exported_scheduler_visits_the_trained_levels_from_the_pipelines_even_steps(directory, count, warp):
    steps = tuple(1000 - 1000 * k / count for k in range(count))
    sigmas = few_step_sigmas(steps, flow_shift=FLOW_SHIFT, warp=warp)
    scheduler = few_step_scheduler_for(directory, sigmas)
    scheduler.set_timesteps(sigmas=[1 - k / count for k in range(count)])
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0], abs=1e-5)
    # The one for pipelines that pass a number of steps would miss them.
    if count > 2 and warp:
        other = few_step_scheduler(sigmas)
        other.set_timesteps(sigmas=[1 - k / count for k in range(count)])
        assert other.sigmas.tolist() != pytest.approx([*sigmas, 0], abs=1e-3)


def test_a_guider_is_set_where_there_is_one(directory, directory15):
    class Pipeline:
        def __init__(self, **components):
            self.components = components
            vars(self).update(components)

    from diffusers.guiders import ClassifierFreeGuidance

    pipeline = Pipeline(guider=ClassifierFreeGuidance(guidance_scale=4.0))
    set_guider(pipeline, 1.0)
    assert pipeline.guider.guidance_scale == 1.0 and pipeline.guider.num_conditions == 1
    set_guider(Pipeline(), 1.0)


def estimate(model, target, rows, tmp_path):
    config = tiny_runs.dmd2_config(model, rows, tmp_path / "run")
    for role in config["models"].values():
        role["_target_"] = target
    path = tiny_runs.write_config(config, tmp_path / "estimate.yaml")
    return estimate_run(load_run_config(path), Layout(), Device("GPU", None, None, 0.4))


def test_the_estimate_counts_the_network(directory, directory15, tiny_rows, tmp_path):
    # The rows' shapes are all that is looked at.
    found = estimate(directory, TARGET, tiny_rows, tmp_path)
    count = sum(parameter.numel() for parameter in make_tiny_hunyuan_transformer().parameters())
    assert {role.parameters for role in found.roles} == {count} and found.flops_per_step > 0
    with pytest.raises(ValueError, match="no estimate for a HunyuanVideo15Model"):
        estimate(directory15, "fv_distill.models.HunyuanVideo15Model", tiny_rows, tmp_path)


def test_the_published_1_5_has_a_place_for_what_rows_hold(directory15):
    model = HunyuanVideo15Model.from_pretrained(str(directory15), text_length=TEXT_LENGTH)
    conditioning = model.encode_prompts(["a digit"])
    shapes = {name: tuple(value.shape[1:]) for name, value in conditioning.extras.items()}
    assert shapes == model.condition_shapes((LATENT_CHANNELS, 3, 4, 4))
    assert json.loads((directory15 / "guider/guider_config.json").read_text())["guidance_scale"] == 4.0
