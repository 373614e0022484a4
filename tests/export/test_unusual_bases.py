"""Exports of students whose base is none of the usual: replaced weights, a pipeline that nobody here knows."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import checkpoint, finetune_config, train

from fv_distill.export import convert
from fv_distill.generate import _image_argument


def weights_of(directory: Path) -> Path:
    return directory / "transformer/diffusion_pytorch_model.safetensors"


def test_an_adapter_on_replaced_weights_is_merged_into_these(tiny_wan, tiny_rows, tmp_path):
    replaced = {name: value + 1 for name, value in load_file(weights_of(tiny_wan)).items()}
    save_file(replaced, tmp_path / "other.safetensors")
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    lora = {"enable": True, "rank": 2}
    config["models"]["student"] |= {"weights": str(tmp_path / "other.safetensors"), "lora": lora}
    run = train(config, {"training.loop.max_train_steps": 1, "training.checkpoint.every_steps": 1})
    merged = load_file(weights_of(convert(checkpoint(run, 1), tmp_path / "merged")))
    for name, value in merged.items():
        torch.testing.assert_close(value, replaced[name], atol=0.1, rtol=0, msg=name)
    with pytest.raises(ValueError, match=r"was trained on models.<role>.weights='.*other.safetensors'.*use merged"):
        convert(checkpoint(run, 1), tmp_path / "lora", export_format="lora")


def test_a_base_of_an_unknown_pipeline_is_exported_as_it_is(tiny_wan, tiny_rows, tmp_path):
    base = shutil.copytree(tiny_wan, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text()) | {"_class_name": "SomebodysPipeline"}
    (base / "model_index.json").write_text(json.dumps(index))
    config = finetune_config(base, tiny_rows, tmp_path / "run")
    run = train(config, {"training.loop.max_train_steps": 1, "training.checkpoint.every_steps": 1})
    exported = convert(checkpoint(run, 1), tmp_path / "student")
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "SomebodysPipeline"


def test_a_first_frame_for_a_pipeline_without_a_size_keeps_its_own(tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "first.png")
    given = _image_argument(diffusers.HunyuanVideo15ImageToVideoPipeline, {}, tmp_path / "first.png")
    assert given["image"].size == (40, 24)
    given = _image_argument(diffusers.WanImageToVideoPipeline, {"width": 16, "height": 32}, tmp_path / "first.png")
    assert given["image"].size == (16, 32)
