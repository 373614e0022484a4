"""A trained adapter through stock diffusers only: each form gives the network that was trained."""

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import LATENT_CHANNELS, TEXT_DIM

from fv_distill.export import (
    LoraWeights,
    StudentInfo,
    export_lora_directory,
    merge_lora,
    write_comfyui_lora,
)
from fv_distill.lora import LoraSpec, is_lora_parameter, lora_key
from fv_distill.models import WanModel

KINDS = {
    "plain": {},
    "scaled": {"alpha": 5.0},
    "rslora": {"rslora": True, "alpha": 2.0},
    "dora": {"dora": True},
    "linear": {"target_modules": "linear"},
}


def trained(tiny_wan, **options):
    """A student with a random adapter on everything, and the adapter."""
    model = WanModel.from_pretrained(str(tiny_wan))
    model.add_lora("student", **{"rank": 3, "target_modules": "all", **options})
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, parameter in model.transformer.named_parameters():
        if is_lora_parameter(name, "student"):
            if "magnitude" not in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            weights[lora_key(name, "student")] = parameter.detach().clone()
    return model, LoraWeights(weights, model.lora)


def output(network):
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, LATENT_CHANNELS, 3, 4, 4), (2, 6, TEXT_DIM)))
    with torch.no_grad():
        return network(x, torch.tensor([900.0, 125.0]), text, return_dict=False)[0]


def assert_same_function(network, model, tiny_wan):
    expected, bare = output(model.transformer), output(WanPipeline.from_pretrained(tiny_wan).transformer)
    torch.testing.assert_close(output(network), expected, atol=1e-5, rtol=1e-5)
    assert (expected - bare).abs().max() > 1e-2, "an adapter that does nothing proves nothing"


def info(tiny_wan, **options):
    return StudentInfo(base_model=str(tiny_wan), method="fv_distill.methods.DMD2Method", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_directory_loads_into_a_stock_pipeline(tiny_wan, tmp_path, kind):
    model, lora = trained(tiny_wan, **KINDS[kind])
    directory = export_lora_directory(tmp_path / "lora", lora, info(tiny_wan))
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(directory)
    assert_same_function(pipeline.transformer, model, tiny_wan)
    with safe_open(directory / "pytorch_lora_weights.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == 3 and config["transformer.use_dora"] is (kind == "dora")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_a_whole_network(tiny_wan, kind):
    model, lora = trained(tiny_wan, **KINDS[kind])
    network = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    network.load_state_dict(merge_lora(str(tiny_wan), lora))
    assert_same_function(network, model, tiny_wan)


@pytest.mark.parametrize("kind", ["plain", "scaled", "rslora", "linear"])
def test_the_comfyui_file_loads_into_a_stock_pipeline_too(tiny_wan, tmp_path, kind):
    model, lora = trained(tiny_wan, **KINDS[kind])
    path = write_comfyui_lora(tmp_path / "lora.safetensors", lora)
    names = load_file(path).keys()
    assert "diffusion_model.blocks.0.cross_attn.o.lora_down.weight" in names
    assert not any(name.endswith(".alpha") for name in names)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(path)
    assert_same_function(pipeline.transformer, model, tiny_wan)


def test_a_few_step_adapter_brings_its_scheduler(tiny_wan, tmp_path):
    _, lora = trained(tiny_wan)
    directory = export_lora_directory(tmp_path / "lora", lora, info(tiny_wan, sigmas=(1.0, 0.75), sample_type="sde"))
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory, subfolder="scheduler")
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0], abs=1e-5)


def test_the_base_models_licence_comes_along(tiny_wan, tmp_path):
    base = shutil.copytree(tiny_wan, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_link: terms.md\n---\n")
    for name in ("LICENSE.txt", "NOTICE", "terms.md"):
        (base / name).write_text(f"the text of {name}")
    _, lora = trained(base)
    export_lora_directory(tmp_path / "lora", lora, info(base))
    for name in ("LICENSE.txt", "NOTICE", "terms.md"):
        assert (tmp_path / "lora" / name).read_text() == f"the text of {name}"


def test_a_card_cannot_have_files_copied_from_elsewhere(tiny_wan, tmp_path):
    base = shutil.copytree(tiny_wan, tmp_path / "base")
    (tmp_path / "secret").write_text("mine")
    (base / "README.md").write_text("---\nlicense: other\nlicense_link: ../secret\n---\n")
    _, lora = trained(base)
    (tmp_path / "out").mkdir()
    export_lora_directory(tmp_path / "out" / "lora", lora, info(base))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora"]


def test_what_is_there_is_not_lost(tiny_wan, tmp_path):
    _, lora = trained(tiny_wan)
    path, directory = tmp_path / "lora.safetensors", tmp_path / "lora"
    for _ in range(2):
        export_lora_directory(directory, lora, info(tiny_wan), overwrite=True)
        write_comfyui_lora(path, lora, overwrite=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        export_lora_directory(directory, lora, info(tiny_wan))
    with pytest.raises(FileExistsError, match=r"lora\.safetensors exists"):
        write_comfyui_lora(path, lora)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else than an export"):
        export_lora_directory(tmp_path / "mine", lora, info(tiny_wan), overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lora", "lora.safetensors", "mine"]


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        ({"dora": True}, ["blocks.0.attn1.to_q"], "a DoRA's magnitudes have no place"),
        ({}, ["time_text_embed.linear"], "time_text_embed.linear has no name in the original Wan"),
    ],
)
def test_what_comfyui_has_no_name_for_is_refused(tmp_path, spec, keys, message):
    weights = {f"{key}.{factor}.weight": torch.zeros(2, 2) for key in keys for factor in ("lora_A", "lora_B")}
    with pytest.raises(ValueError, match=message):
        write_comfyui_lora(tmp_path / "x.safetensors", LoraWeights(weights, LoraSpec(2, 2.0, ("to_q",), **spec)))
    assert list(tmp_path.iterdir()) == []
