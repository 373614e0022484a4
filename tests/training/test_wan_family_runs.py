"""Image-to-video Wan, TI2V 5B and two experts: trained, resumed, validated, exported, sampled by stock pipelines."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_runs import assert_same_state, checkpoint, metrics, train
from tiny_wan import (
    CLIP_TEXT_LENGTH,
    make_ti2v_directory,
    make_wan21_i2v_directory,
    make_wan22_i2v_directory,
    make_wan22_t2v_directory,
)

from fv_distill.data import write_rows
from fv_distill.export import convert
from fv_distill.models.wan_encoders import WanImageEncoders

MAKERS = {
    "wan21_i2v": make_wan21_i2v_directory,
    "wan22_i2v": make_wan22_i2v_directory,
    "ti2v": make_ti2v_directory,
    "wan22_t2v": make_wan22_t2v_directory,
}
IMAGE = {"_target_": "fv_distill.models.WanImageToVideoModel"}
LATENT_SHAPE = (4, 3, 4, 4)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan_family")
    return {name: make(root / name) for name, make in MAKERS.items()}


def size_of(name):
    return 64 if name == "ti2v" else 32


@pytest.fixture(scope="module")
def clips(directories, tmp_path_factory):
    """Rows of each directory's own encoders, as preprocessing writes them."""
    root = tmp_path_factory.mktemp("clips")
    for name, directory in directories.items():
        encoders = WanImageEncoders(directory, device=torch.device("cpu"), dtype=torch.float32, text_length=TEXT_LENGTH)
        generator = torch.Generator().manual_seed(0)
        size = size_of(name)
        rows = []
        for _ in range(4):
            video = torch.rand(1, 3, 9, size, size, generator=generator)
            features = {} if name == "wan22_t2v" else encoders.encode_images(video)
            rows.append(
                {
                    "caption": "a digit",
                    "num_frames": 9,
                    "vae_latent": encoders.encode_video(video)[0],
                    "text_embedding": torch.randn(4, TEXT_DIM, generator=generator),
                    **{column: value[0] for column, value in features.items()},
                }
            )
        write_rows(root / name / "rows.parquet", rows)
    return {name: root / name for name in directories}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of one prompt and its first frame, of another size than the clips."""
    folder = tmp_path_factory.mktemp("prompts")
    picture = np.random.default_rng(1).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "first.png")
    path = folder / "prompts.json"
    path.write_text(json.dumps([{"caption": "a digit moving left", "image": "first.png"}]))
    return path


def finetune_config(directory, rows, output_dir, **model):
    return {
        "models": {"student": {"init_from": str(directory), "trainable": True, **model}},
        "method": {"_target_": "fv_distill.methods.FineTuneMethod"},
        "training": {
            "output_dir": str(output_dir),
            "data": {
                "data_path": str(rows),
                "train_batch_size": 2,
                "text_length": CLIP_TEXT_LENGTH if "wan21" in directory.name else TEXT_LENGTH,
                "caption_dropout": 0.3,
                "cache_dir": str(rows.with_name(f"{rows.name}-cache")),
            },
            "optimizer": {"learning_rate": 1e-3},
            "loop": {"max_train_steps": 2},
            "checkpoint": {"every_steps": 1},
            "tracker": {"trackers": []},
        },
    }


def dmd2_config(directory, rows, output_dir, **model):
    config = finetune_config(directory, rows, output_dir, **model)
    config["models"] |= {
        "teacher": {"init_from": str(directory), **model},
        "critic": {"init_from": str(directory), "trainable": True, **model},
    }
    config["method"] = {
        "_target_": "fv_distill.methods.DMD2Method",
        "dmd_denoising_steps": [1000, 500],
        "generator_update_interval": 1,
        "real_score_guidance_scale": 3.0,
    }
    return config


# The network's options, and what a run of it needs beside them.
RUNS = {
    "wan21_i2v": ("wan21_i2v", IMAGE, {"cfg_uncond": {"image": "zero"}}),
    "ti2v": ("ti2v", IMAGE, {"cfg_uncond": {"image": "drop"}}),
    "wan22_i2v_high": ("wan22_i2v", {**IMAGE, "expert": "high"}, {}),
    "wan22_t2v_high": ("wan22_t2v", {"expert": "high"}, {}),
    "wan22_t2v_low": ("wan22_t2v", {"expert": "low"}, {"rollout_mode": "data_latent"}),
    "wan22_i2v_low": ("wan22_i2v", {**IMAGE, "expert": "low"}, {}),
}


def sample(directory, prompts, name, **call):
    """By whatever pipeline the export names."""
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": Image.open(prompts.parent / "first.png")} if "ImageToVideo" in type(pipeline).__name__ else {}
    call = {**json.loads((directory / "fv_distill.json").read_text())["call"], **call}
    frames = pipeline(prompt="a digit", **image, **call, output_type="np", generator=torch.Generator().manual_seed(0))
    return pipeline, frames.frames


@pytest.mark.parametrize("run", RUNS)
def test_dmd2_trains_resumes_exports_and_samples(directories, clips, prompts, tmp_path, run):
    name, model, options = RUNS[run]
    config = dmd2_config(directories[name], clips[name], tmp_path / "whole", **model)
    config["method"] |= options
    takes_image = "_target_" in model
    if run == "wan22_i2v_low":
        config["models"]["high_expert"] = {"init_from": str(directories[name]), **model, "expert": "high"}
    config["callbacks"] = {
        "ema": {"decay": 0.5},
        "validation": {
            "dataset_file": str(prompts),
            "pipeline_target": f"diffusers.Wan{'ImageToVideo' if takes_image else ''}Pipeline",
            "every_steps": 2,
        },
    }
    whole = train(config)
    assert [{"loss/student", "loss/critic"} <= line.keys() for line in metrics(whole)] == [True, True]
    assert len(list((whole / "validation/step-00000002").glob("000_2-steps.*"))) == 1
    resumed = tmp_path / "resumed"
    train(
        config,
        {
            "training.output_dir": str(resumed),
            "training.checkpoint.resume_from_checkpoint": str(checkpoint(whole, 1)),
        },
    )
    assert_same_state(checkpoint(whole, 2), checkpoint(resumed, 2), num_networks=3, num_optimizers=2)

    exported = convert(checkpoint(whole, 2), tmp_path / "student")
    pipeline, frames = sample(exported, prompts, name)
    assert frames.shape == (1, 9, size_of(name), size_of(name), 3)
    assert type(pipeline).__name__ == ("WanImageToVideoPipeline" if takes_image else "WanPipeline")
    trained = "transformer_2" if model.get("expert") == "low" else "transformer"
    base = DiffusionPipeline.from_pretrained(directories[name])
    for component in ("transformer", "transformer_2"):
        ours, theirs = getattr(pipeline, component, None), getattr(base, component, None)
        if theirs is not None:
            same = all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
            assert same == (component != trained), component
    if "expert" in model:
        assert pipeline.config.boundary_ratio == 0.875


@pytest.mark.parametrize("run", RUNS)
def test_fine_tuning(directories, clips, tmp_path, run):
    name, model, _ = RUNS[run]
    run_dir = train(finetune_config(directories[name], clips[name], tmp_path / "run", **model))
    assert all(np.isfinite(line["loss/student"]) for line in metrics(run_dir))
    convert(checkpoint(run_dir, 2), tmp_path / "student")


@pytest.mark.parametrize(("run", "preset"), [("wan21_i2v", "image_attention"), ("wan22_t2v_low", "attention")])
def test_a_lora_is_exported_and_its_card_runs(directories, clips, tmp_path, monkeypatch, run, preset):
    name, model, _ = RUNS[run]
    lora = {"lora": {"enable": True, "rank": 2, "target_modules": preset}}
    run_dir = train(finetune_config(directories[name], clips[name], tmp_path / "run", **model, **lora))
    exported = convert(checkpoint(run_dir, 2), tmp_path / "student")
    merged = convert(checkpoint(run_dir, 2), tmp_path / "merged", export_format="merged")
    card = (exported / "README.md").read_text()
    snippet = card.split("```python")[1].split("```")[0]
    # The card names the base model as the Hub would.
    (tmp_path / directories[name].name).symlink_to(directories[name])
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(
        compile(
            snippet.replace('    output_type="pil",', '    num_inference_steps=2, output_type="pil",'), "card", "exec"
        ),
        scope,
    )
    assert (tmp_path / "sample.gif").is_file()
    component = "transformer_2" if model.get("expert") == "low" else "transformer"
    assert getattr(scope["pipe"], component).peft_config
    weights = getattr(DiffusionPipeline.from_pretrained(merged), component).state_dict()
    before = getattr(DiffusionPipeline.from_pretrained(directories[name]), component).state_dict()
    changed = {key for key in weights if not torch.equal(weights[key], before[key])}
    assert changed and all(".to_" in key or ".add_" in key for key in changed)
    assert any(".add_k_proj" in key for key in changed) == (preset == "image_attention")
