"""The configs of image-to-video Wan, TI2V 5B and two experts fit the networks as they were published."""

from pathlib import Path

import pytest
import torch

from fv_distill.config import load_run_config
from fv_distill.estimate import Layout
from fv_distill.estimate.estimate import Device
from fv_distill.estimate.published import config_directory
from fv_distill.models import WanImageToVideoModel, WanModel
from fv_distill.training.building import build_models
from fv_distill.training.estimating import estimate_run
from fv_distill.training.run import build_method

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"
NAMES = [
    "wan2.1_i2v_14b",
    "wan2.2_ti2v_5b",
    *(f"wan2.2_{kind}_14b_{expert}" for kind in ("t2v", "i2v") for expert in ("high", "low")),
]
# Clips of the fine-tuning configs, as their comments say.
CLIPS = {"wan2.2_ti2v_5b": (48, 31, 44, 80)}


@pytest.mark.parametrize(
    ("name", "kind", "options", "parameters"),
    [
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", WanImageToVideoModel, {}, 16.4e9),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", WanImageToVideoModel, {}, 5.0e9),
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", WanImageToVideoModel, {"expert": "high"}, 14.29e9),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", WanModel, {"expert": "low"}, 14.29e9),
    ],
)
def test_published_networks_have_the_published_size(name, kind, options, parameters):
    with config_directory(name) as directory, torch.device("meta"):
        model = kind.from_pretrained(str(directory), text_length=512, **options)
    count = sum(parameter.numel() for parameter in model.transformer.parameters())
    assert count == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("method", ["finetune", "dmd2"])
@pytest.mark.parametrize("name", NAMES)
def test_the_roles_of_a_config_fit_each_other_and_its_clips(method, name):
    config = load_run_config(CONFIGS / method / f"{name}.yaml")
    published = next(model.init_from for model in config.models.values() if model.init_from.startswith("Wan-AI/"))
    with config_directory(published) as directory:
        for model in config.models.values():
            model.init_from = str(directory)
        with torch.device("meta"):
            models = build_models(config)
        built = build_method(config, models)
        student = models["student"]
        shape = config.training.data.latent_shape or CLIPS.get(name, (16, 21, 60, 104))
        student.check_latent_shape(shape)
        student.check_conditions(student.condition_shapes(shape), shape)
        assert ("first_frame_latent" in student.condition_shapes(shape)) == ("i2v" in name or "ti2v" in name)
        assert ("clip_feature" in student.condition_shapes(shape)) == ("wan2.1" in name)
    if "14b_" in name and method == "dmd2":
        own = [sigma for sigma in built.few_step_sigmas if student.covers(sigma)]
        assert own == pytest.approx([1, 0.9375] if "high" in name else [0.83333, 0.625], abs=1e-4)


@pytest.mark.slow
def test_whole_networks_fit_sixteen_gpus():
    config = load_run_config(CONFIGS / "dmd2/wan2.1_i2v_14b.yaml")
    layout = Layout(16, "sharded", 16, "bf16", device_type="cuda")
    estimate = estimate_run(config, layout, Device("GPU", None, None, 0.4))
    assert 60 * 2**30 < estimate.peak.total < 0.9 * 80 * 2**30
