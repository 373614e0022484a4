"""Kandinsky 5, and LTX-2 without its sound: trained, resumed, validated, exported and sampled by stock pipelines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_hunyuan import POOLED_DIM
from tiny_kandinsky5 import make_tiny_kandinsky5_directory, make_tiny_kandinsky5_i2v_directory
from tiny_ltx2 import make_tiny_ltx2_directory
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_runs import assert_same_state, checkpoint, dmd2_config, finetune_config, metrics, train

from fv_distill.data import write_rows
from fv_distill.export import convert

KANDINSKY = ("fv_distill.models.Kandinsky5Model", "diffusers.Kandinsky5T2VPipeline", {}, (4, 3, 4, 4), (9, 32))
KANDINSKY_I2V = ("fv_distill.models.Kandinsky5Model", "diffusers.Kandinsky5I2VPipeline", {}, (4, 5, 4, 4), (17, 32))
LTX2 = ("fv_distill.models.LTX2VideoModel", "diffusers.LTX2Pipeline", {"flow_shift": 8.0}, (4, 3, 2, 2), (17, 64))
FAMILIES = {
    "kandinsky5": (make_tiny_kandinsky5_directory, *KANDINSKY),
    "kandinsky5_i2v": (make_tiny_kandinsky5_i2v_directory, *KANDINSKY_I2V),
    "ltx2": (make_tiny_ltx2_directory, *LTX2),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory) -> Path:
    return FAMILIES[family][0](tmp_path_factory.mktemp(family) / "model")


@pytest.fixture(scope="module")
def rows(family, tmp_path_factory) -> Path:
    *_, shape, (num_frames, _) = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            "caption": "a digit",
            "num_frames": num_frames,
            "vae_latent": torch.randn(shape, generator=generator),
            "text_embedding": torch.randn(TEXT_LENGTH - index % 3, TEXT_DIM, generator=generator),
            "pooled_text_embedding": torch.randn(POOLED_DIM, generator=generator),
        }
        for index in range(4)
    ]
    path = tmp_path_factory.mktemp(family) / "rows"
    write_rows(path / "rows.parquet", made)
    return path


@pytest.mark.parametrize("make", [finetune_config, dmd2_config], ids=["finetune", "dmd2"])
def test_it_trains_resumes_exports_and_samples(family, directory, rows, tmp_path, make):
    _, target, pipeline_target, options, _, (num_frames, size) = FAMILIES[family]
    image = Image.new("RGB", (size, size), "red")
    image.save(tmp_path / "red.png")
    images = {"image": image} if family == "kandinsky5_i2v" else {}
    prompt = {"caption": "a digit", **dict.fromkeys(images, "red.png")}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt))
    config = make(directory, rows, tmp_path / "whole")
    for model in config["models"].values():
        model |= {"_target_": target, **options}
    config["training"] |= {"loop": {"max_train_steps": 2}, "checkpoint": {"every_steps": 1}}
    config["training"]["model"] = {"gradient_checkpointing": True}
    config.setdefault("callbacks", {})["validation"] = {
        "dataset_file": str(tmp_path / "prompts.jsonl"),
        "pipeline_target": pipeline_target,
        "every_steps": 2,
        "sampling_steps": [2],
        # Of the tiny LTX-2 there is no block 28 for its spatio-temporal guidance.
        **({"stg_scale": 0.0, "audio_stg_scale": 0.0} if family == "ltx2" else {}),
    }
    whole = train(config)
    assert len(metrics(whole)) == 2
    assert len(list((whole / "validation/step-00000002").glob("000_2-steps.*"))) == 1
    resumed = tmp_path / "resumed"
    at_first = str(checkpoint(whole, 1))
    train(config, {"training.output_dir": str(resumed), "training.checkpoint.resume_from_checkpoint": at_first})
    counts = (1, 1) if make is finetune_config else (3, 2)
    assert_same_state(checkpoint(whole, 2), checkpoint(resumed, 2), num_networks=counts[0], num_optimizers=counts[1])

    exported = convert(checkpoint(whole, 2), tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(exported)
    call = json.loads((exported / "fv_distill.json").read_text())["call"]
    if make is finetune_config and family == "ltx2":
        call |= {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    result = pipeline(prompt="a digit", **images, **{"num_inference_steps": 2, **call}, output_type="np")
    assert result.frames.shape == (1, num_frames, size, size, 3) and np.isfinite(result.frames).all()
    if make is dmd2_config:
        shift = pipeline.scheduler.sigmas.new_tensor(options.get("flow_shift", 5.0))
        expected = torch.stack([shift.new_tensor(1.0), shift / (1 + shift), shift.new_tensor(0.0)])
        torch.testing.assert_close(pipeline.scheduler.sigmas, expected, atol=1e-5, rtol=0)
