"""LongCat-Video from its published layout: trained, resumed, validated, exported, loaded and sampled again."""

import json

import pytest
import torch
from tiny_longcat import make_tiny_longcat_directory
from tiny_models import LATENT_CHANNELS, TEXT_DIM
from tiny_runs import (
    assert_same_state,
    checkpoint,
    dmd2_config,
    finetune_config,
    metrics,
    shared_base_config,
    train,
)

from fv_distill.cli import main
from fv_distill.data import write_rows
from fv_distill.export import convert
from fv_distill.models import LongCatVideoModel
from fv_distill.models.pipelines import LongCatVideoPipeline

PIPELINE = "fv_distill.models.pipelines.LongCatVideoPipeline"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_tiny_longcat_directory(tmp_path_factory.mktemp("model") / "LongCat-Video", published=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("longcat") / "rows"
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            "caption": "a digit",
            "num_frames": 9,
            "vae_latent": torch.randn(LATENT_CHANNELS, 3, 4, 4, generator=generator),
            "text_embedding": torch.randn(3 + index % 3, TEXT_DIM, generator=generator),
        }
        for index in range(4)
    ]
    write_rows(directory / "rows.parquet", made)
    return directory


def configure(make, published, rows, output_dir, **student):
    config = make(published, rows, output_dir)
    for model in config["models"].values():
        model["_target_"] = "fv_distill.models.LongCatVideoModel"
    config["models"]["student"] |= student
    config["training"]["loop"] = {"max_train_steps": 2}
    config["training"]["checkpoint"] = {"every_steps": 1}
    config["training"]["model"] = {"gradient_checkpointing": True}
    return config


@pytest.mark.parametrize(
    ("make", "networks", "optimizers", "condition_frames"),
    [(finetune_config, 1, 1, 1), (dmd2_config, 3, 2, 0), (dmd2_config, 3, 2, 1)],
    ids=["finetune_i2v", "dmd2", "dmd2_i2v"],
)
def test_it_trains_resumes_and_exports(published, rows, tmp_path, make, networks, optimizers, condition_frames):
    (tmp_path / "prompts.txt").write_text("a digit\n")
    config = configure(make, published, rows, tmp_path / "whole", condition_frames=condition_frames)
    config.setdefault("callbacks", {})["validation"] = {
        "dataset_file": str(tmp_path / "prompts.txt"),
        "pipeline_target": PIPELINE,
        "every_steps": 2,
        "sampling_steps": [2],
    }
    whole = train(config)
    assert all(line["loss/student" if make is finetune_config else "loss/critic"] > 0 for line in metrics(whole))
    assert len(list((whole / "validation/step-00000002").glob("000_2-steps.*"))) == 1
    at_first = str(checkpoint(whole, 1))
    resumed = tmp_path / "resumed"
    train(config, {"training.output_dir": str(resumed), "training.checkpoint.resume_from_checkpoint": at_first})
    assert_same_state(checkpoint(whole, 2), checkpoint(resumed, 2), num_networks=networks, num_optimizers=optimizers)

    exported = convert(checkpoint(whole, 2), tmp_path / "student")
    assert {path.name for path in exported.iterdir()} >= {
        *("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "README.md"),
    }
    assert not (exported / "dit").exists() and not (exported / "lora").exists()
    assert f"from {PIPELINE.rpartition('.')[0]} import LongCatVideoPipeline" in (exported / "README.md").read_text()
    before, after = (LongCatVideoModel.from_pretrained(str(path)) for path in (published, exported))
    pairs = zip(before.transformer.parameters(), after.transformer.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)

    pipeline = LongCatVideoPipeline.from_pretrained(exported)
    call = json.loads((exported / "fv_distill.json").read_text())["call"]
    frames = pipeline("a digit", **{"num_inference_steps": 2, **call}, output_type="np").frames
    assert frames.shape == (1, 9, 32, 32, 3)
    if make is dmd2_config:
        # Both steps are the student's levels at shift 12.
        torch.testing.assert_close(pipeline.scheduler.sigmas, torch.tensor([1.0, 12 / 13, 0.0]), atol=1e-5, rtol=0)


def test_the_export_is_generated_from_and_trained_on(published, rows, tmp_path):
    exported = convert(
        checkpoint(train(configure(finetune_config, published, rows, tmp_path / "one")), 2), tmp_path / "student"
    )
    options = ["--num-inference-steps", "1", "--guidance-scale", "1", "--output", str(tmp_path / "clip.gif")]
    main(["generate", "--model", str(exported), "--prompt", "a digit", *options])
    assert (tmp_path / "clip.gif").stat().st_size > 100
    again = configure(finetune_config, exported, rows, tmp_path / "two")
    assert len(metrics(train(again))) == 2


def test_adapters_on_a_shared_base_are_exported_and_merged(published, rows, tmp_path):
    config = configure(shared_base_config, published, rows, tmp_path / "run")
    run = train(config)
    exported = convert(checkpoint(run, 2), tmp_path / "lora")
    pipeline = LongCatVideoPipeline.from_pretrained(published)
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0}
    call |= {"max_sequence_length": 8, "output_type": "latent"}

    def sample(pipeline):
        return pipeline("a digit", generator=torch.Generator().manual_seed(0), **call).frames

    bare = sample(pipeline)
    pipeline.load_lora_weights(exported, weight_name="pytorch_lora_weights.safetensors")
    adapted = sample(pipeline)
    assert (adapted - bare).abs().max() > 1e-5
    merged = convert(checkpoint(run, 2), tmp_path / "merged", export_format="merged")
    pipeline = LongCatVideoPipeline.from_pretrained(merged, scheduler=pipeline.scheduler)
    torch.testing.assert_close(sample(pipeline), adapted, atol=1e-5, rtol=0)
