"""The configs of HunyuanVideo, Kandinsky 5 and Cosmos fit the networks as they were published, without weights."""

from pathlib import Path

import pytest
import tiny_cosmos  # noqa: F401  # torchvision's place, where it is missing
import torch

from fv_distill.config import load_run_config
from fv_distill.estimate import Layout
from fv_distill.estimate.estimate import Device
from fv_distill.estimate.published import config_directory
from fv_distill.export.call_arguments import training_call_arguments
from fv_distill.export.scheduler import few_step_scheduler_for
from fv_distill.models import (
    CosmosModel,
    HunyuanVideo15Model,
    HunyuanVideoImageToVideoModel,
    HunyuanVideoModel,
    Kandinsky5Model,
)
from fv_distill.schedules import few_step_sigmas
from fv_distill.training.estimating import estimate_run

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"
# Name of the configs: adapter, published network, parameters, size and frames of the clips.
FAMILIES = {
    "hunyuanvideo": (HunyuanVideoModel, "hunyuanvideo-community/HunyuanVideo", 12.8e9, (480, 832, 81)),
    "hunyuanvideo_i2v": (
        HunyuanVideoImageToVideoModel,
        "hunyuanvideo-community/HunyuanVideo-I2V",
        12.8e9,
        (480, 832, 81),
    ),
    "hunyuanvideo1.5": (
        HunyuanVideo15Model,
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        8.3e9,
        (480, 832, 121),
    ),
    "kandinsky5_lite": (
        Kandinsky5Model,
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        2.008e9,
        (512, 768, 121),
    ),
    "kandinsky5_i2v_lite": (
        Kandinsky5Model,
        "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers",
        2.008e9,
        (512, 768, 121),
    ),
    "cosmos2.5_2b": (CosmosModel, "nvidia/Cosmos-Predict2.5-2B", 2.06e9, (704, 1280, 93)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    kind, published, size, clip = FAMILIES[request.param]
    with config_directory(published) as directory:
        with torch.device("meta"):
            model = kind.from_pretrained(str(directory))
        yield request.param, model, size, clip


def test_published_networks_have_the_published_size(family):
    _, model, size, _ = family
    assert sum(parameter.numel() for parameter in model.transformer.parameters()) == pytest.approx(size, rel=0.01)


def test_the_configs_fit_the_network(family):
    name, model, _, (height, width, frames) = family
    for method in ("finetune", "dmd2"):
        config = load_run_config(CONFIGS / method / f"{name}.yaml")
        for role in config.models.values():
            assert role.target == f"fv_distill.models.{type(model).__name__}"
        assert config.models["student"].flow_shift == model.flow_shift, "the published scheduler's"
        lora = config.models["student"].lora
        assert not lora.enable or lora.target_modules in model.lora_presets
    shape = config.training.data.latent_shape
    assert shape is not None
    model.check_latent_shape(shape, num_frames=frames)
    call = training_call_arguments(model.directory, shape, text_length=config.training.data.text_length)
    assert (call["height"], call["width"], call["num_frames"]) == (height, width, frames)


def test_the_students_levels_are_visited_by_the_familys_pipeline(family):
    name, model, _, _ = family
    options = load_run_config(CONFIGS / f"dmd2/{name}.yaml").method.options
    sigmas = few_step_sigmas(options["dmd_denoising_steps"], flow_shift=model.flow_shift, warp=True)
    scheduler = few_step_scheduler_for(model.directory, sigmas)
    if isinstance(model, CosmosModel | Kandinsky5Model):
        scheduler.set_timesteps(4)
    else:
        scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hunyuanvideo", "hunyuanvideo_i2v"])
def test_the_hunyuan_config_fits_eight_gpus(name):
    config = load_run_config(CONFIGS / f"dmd2/{name}.yaml")
    layout = Layout(8, "sharded", 8, "bf16", device_type="cuda")
    found = estimate_run(config, layout, Device("GPU", None, None, 0.4))
    assert found.peak.total < 0.9 * 80 * 2**30
    teacher = next(role for role in found.roles if role.role == "teacher")
    assert teacher.block_parameters < teacher.parameters / 20, "both lists of blocks are gathered block by block"
