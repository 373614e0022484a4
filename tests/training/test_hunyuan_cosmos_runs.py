"""HunyuanVideo, Kandinsky 5 and Cosmos from rows of their own encoders to clips of stock diffusers pipelines."""

import json

import diffusers
import numpy as np
import pytest
import torch
from encoded_rows import write_encoded_rows
from PIL import Image
from tiny_cosmos import PassingChecker, make_tiny_cosmos2_directory, make_tiny_cosmos_directory
from tiny_hunyuan import (
    IMAGE_TEXT_LENGTH,
    make_tiny_hunyuan15_directory,
    make_tiny_hunyuan15_i2v_directory,
    make_tiny_hunyuan_directory,
    make_tiny_hunyuan_i2v_directory,
)
from tiny_kandinsky5 import make_tiny_kandinsky5_directory, make_tiny_kandinsky5_i2v_directory
from tiny_models import TEXT_LENGTH
from tiny_runs import (
    assert_same_state,
    checkpoint,
    dmd2_config,
    finetune_config,
    kd_config,
    metrics,
    shared_base_config,
    train,
)

from fv_distill import models
from fv_distill.data import ParquetDataset, write_rows
from fv_distill.export.convert import convert


def make_concat_directory(path):
    return make_tiny_hunyuan_i2v_directory(path, kind="latent_concat")


FAMILIES = {
    "hunyuan": (make_tiny_hunyuan_directory, "HunyuanVideoModel", {}),
    "hunyuan_i2v": (make_tiny_hunyuan_i2v_directory, "HunyuanVideoImageToVideoModel", {}),
    "hunyuan_i2v_concat": (make_concat_directory, "HunyuanVideoImageToVideoModel", {}),
    "hunyuan15": (make_tiny_hunyuan15_directory, "HunyuanVideo15Model", {}),
    "hunyuan15_i2v": (make_tiny_hunyuan15_i2v_directory, "HunyuanVideo15Model", {}),
    "kandinsky5": (make_tiny_kandinsky5_directory, "Kandinsky5Model", {}),
    "kandinsky5_i2v": (make_tiny_kandinsky5_i2v_directory, "Kandinsky5Model", {"condition_frames": 1}),
    "cosmos": (make_tiny_cosmos_directory, "CosmosModel", {}),
    "cosmos_video2world": (make_tiny_cosmos_directory, "CosmosModel", {"condition_frames": 1}),
    "cosmos2": (make_tiny_cosmos2_directory, "CosmosModel", {"condition_frames": 1}),
}
# Frames of the clips, where they aren't 9; Kandinsky's image-to-video pipeline makes NaN of as short ones.
NUM_FRAMES = {"kandinsky5_i2v": 17}
LORA_IN_PIPELINE = {
    "hunyuan": True,
    "hunyuan_i2v": True,
    "hunyuan15": False,
    "kandinsky5": True,
    "kandinsky5_i2v": True,
    "cosmos": True,
}
# Made of a first frame.
IMAGE_FAMILIES = ("hunyuan_i2v", "hunyuan_i2v_concat", "hunyuan15_i2v", "kandinsky5_i2v")


def text_length_of(name):
    return IMAGE_TEXT_LENGTH if name.startswith("hunyuan_i2v") else TEXT_LENGTH


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Directory and rows of each, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def family(name):
        make, adapter, _ = FAMILIES[name]
        if name not in made:
            directory = make(folder / f"{name}-model")
            model = getattr(models, adapter).from_pretrained(str(directory), text_length=text_length_of(name))
            rows = write_encoded_rows(folder / f"{name}-rows", model, num_frames=NUM_FRAMES.get(name, 9))
            made[name] = directory, rows
        return made[name]

    return family


def config_of(make, name, families, output):
    _, adapter, options = FAMILIES[name]
    directory, rows = families(name)
    config = make(directory, rows, output)
    for role in config["models"].values():
        role |= {"_target_": f"fv_distill.models.{adapter}", **options}
    config["training"]["loop"]["max_train_steps"] = 2
    config["training"]["checkpoint"]["every_steps"] = 1
    config["training"]["data"] |= {"caption_dropout": 0.5, "text_length": text_length_of(name)}
    return config


def load_pipeline(directory, name):
    kind = getattr(diffusers, json.loads((directory / "model_index.json").read_text())["_class_name"])
    checker = {"safety_checker": PassingChecker()} if name.startswith("cosmos") else {}
    pipeline = kind.from_pretrained(directory, **checker)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, call, name):
    images = {"cosmos2": torch.zeros(1, 3, 32, 32), **dict.fromkeys(IMAGE_FAMILIES, Image.new("RGB", (32, 32), "red"))}
    image = {"image": images[name]} if name in images else {}
    torch.manual_seed(0)
    frames = pipeline(
        prompt="a digit", generator=torch.Generator().manual_seed(0), output_type="np", **call, **image
    ).frames[0]
    # The pipeline of latent_concat leaves the first latent's and three more out.
    num_frames = 5 if name == "hunyuan_i2v_concat" else NUM_FRAMES.get(name, 9)
    assert frames.shape == (num_frames, 32, 32, 3) and np.isfinite(frames).all()
    return frames


@pytest.mark.parametrize("name", FAMILIES)
def test_fine_tuning_resumes_and_its_export_generates(name, families, tmp_path):
    config = config_of(finetune_config, name, families, tmp_path / "run")
    whole = train(config)
    resumed = train(
        config,
        {
            "training.output_dir": str(tmp_path / "resumed"),
            "training.checkpoint.resume_from_checkpoint": str(checkpoint(whole, 1)),
        },
    )
    assert_same_state(checkpoint(whole, 2), checkpoint(resumed, 2), num_networks=1, num_optimizers=1)
    export = convert(checkpoint(whole, 2), tmp_path / "export")
    info = json.loads((export / "fv_distill.json").read_text())
    embedded = {"hunyuan": 6.0, "hunyuan_i2v": 6.0, "hunyuan_i2v_concat": 1.0}
    assert info["call"].get("guidance_scale") == embedded.get(name)
    call = {"num_inference_steps": 2, **info["call"]}
    pipeline = load_pipeline(export, name)
    ours = generate(pipeline, call, name)
    base = load_pipeline(families(name)[0], name)
    assert type(pipeline.scheduler) is type(base.scheduler)
    assert np.abs(ours - generate(base, call, name)).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "cosmos2"])
def test_dmd2_trains_and_its_export_visits_the_trained_levels(name, families, tmp_path):
    run = train(config_of(dmd2_config, name, families, tmp_path / "run"))
    assert {"loss/student", "loss/critic"} <= set(metrics(run)[-1])
    export = convert(checkpoint(run, 2), tmp_path / "export", ema=False)
    info = json.loads((export / "fv_distill.json").read_text())
    pipeline = load_pipeline(export, name)
    generate(pipeline, info["call"], name)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*info["sigmas"], 0], abs=1e-5)
    if name.startswith("hunyuan15"):
        assert pipeline.guider.guidance_scale == 1.0


@pytest.mark.parametrize("name", ["hunyuan_i2v", "hunyuan_i2v_concat", "kandinsky5_i2v"])
def test_kd_of_image_to_video_trains_on_guided_paths(name, families, tmp_path):
    config = config_of(kd_config, name, families, tmp_path / "run")
    config["method"]["teacher_guidance_scale"] = 3.0
    run = train(config)
    assert np.isfinite([line["loss/student"] for line in metrics(run)]).all()
    export = convert(checkpoint(run, 2), tmp_path / "export")
    generate(load_pipeline(export, name), json.loads((export / "fv_distill.json").read_text())["call"], name)
    row = ParquetDataset(config["method"]["teacher_path_cache"], cache_dir=str(tmp_path / "cache"))[0]
    states, given = row["trajectory_latents"], row["first_frame_latent"]
    assert torch.allclose(states[-1][:, :1], given, atol=1e-4) is (name != "hunyuan_i2v_concat")
    assert (states[0][:, :1] - given).abs().max() > 0.1


@pytest.mark.parametrize("name", LORA_IN_PIPELINE)
def test_adapters_are_exported_in_the_form_that_the_pipeline_loads(name, families, tmp_path):
    run = train(config_of(shared_base_config, name, families, tmp_path / "run"))
    export = convert(checkpoint(run, 2), tmp_path / "export", ema=False)
    info = json.loads((export / "fv_distill.json").read_text())
    merged = export
    if LORA_IN_PIPELINE[name]:
        pipeline = load_pipeline(families(name)[0], name)
        pipeline.load_lora_weights(str(export), weight_name=info["lora_weights"])
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler
        pipeline.scheduler = scheduler.from_pretrained(export, subfolder="scheduler")
        with_adapter = generate(pipeline, info["call"], name)
        merged = convert(checkpoint(run, 2), tmp_path / "merged", ema=False, export_format="merged")
        expected = generate(load_pipeline(merged, name), info["call"], name)
        np.testing.assert_allclose(with_adapter, expected, atol=1e-4)
    else:
        assert info["lora_weights"] is None
        with pytest.raises(ValueError, match="loads no LoRA; export with --format merged"):
            convert(checkpoint(run, 2), tmp_path / "lora", export_format="lora")
    assert (merged / "transformer").is_dir()


def test_a_few_step_predict2_is_not_exported(families, tmp_path):
    config = config_of(dmd2_config, "cosmos2", families, tmp_path / "run")
    config["pipeline"] = {"export_dir": str(tmp_path / "export")}
    with pytest.raises(ValueError, match="samples at EDM's noise levels"):
        train(config)


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan_i2v"])
def test_validation_samples_with_the_familys_pipeline(name, families, tmp_path):
    """HunyuanVideo's guidance is embedded, and its second argument for guidance is switched off."""
    config = config_of(dmd2_config, name, families, tmp_path / "run")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "first.png")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"caption": "a digit", "image": "first.png"}) + "\n")
    kind = "HunyuanVideoPipeline" if name == "hunyuan" else "HunyuanVideoImageToVideoPipeline"
    config["callbacks"]["validation"] = {
        "dataset_file": str(tmp_path / "prompts.jsonl"),
        "pipeline_target": f"diffusers.{kind}",
        "every_steps": 2,
    }
    run = train(config)
    assert list((run / "validation").rglob("*000000*")) or list((run / "validation").rglob("*.mp4"))


@pytest.mark.parametrize(("name", "other"), [("cosmos_video2world", "cosmos"), ("kandinsky5_i2v", "kandinsky5")])
def test_roles_that_are_given_other_frames_are_refused(name, other, families, tmp_path):
    config = config_of(dmd2_config, name, families, tmp_path / "run")
    config["models"]["teacher"] = config_of(dmd2_config, other, families, tmp_path)["models"]["teacher"]
    with pytest.raises(ValueError, match="models.teacher takes 0 latent frames for given, but the student 1"):
        train(config)


@pytest.mark.parametrize("name", ["cosmos_video2world", "kandinsky5_i2v"])
def test_given_frames_that_rows_lack_are_missed_at_the_start(name, families, tmp_path):
    config = config_of(dmd2_config, name, families, tmp_path / "run")
    _, rows = families(name)
    text = [
        {key: row[key] for key in ("caption", "text_embedding", "pooled_text_embedding") if key in row}
        for row in ParquetDataset(str(rows), cache_dir=str(tmp_path))
    ]
    write_rows(tmp_path / "text" / "rows.parquet", text)
    config["training"]["data"] |= {"data_path": str(tmp_path / "text"), "latent_shape": [4, 5, 4, 4]}
    with pytest.raises(ValueError, match="hold neither clips nor a first_frame_latent of the shape"):
        train(config)
