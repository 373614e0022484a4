"""Image-to-video Wan, TI2V 5B and two experts: trained, resumed, validated, exported, sampled by stock pipelines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_runs import assert_same_state, checkpoint, metrics, train
from wan_family_runs import IMAGE, LATENT_SHAPE, MAKERS, RUNS, dmd2_config, finetune_config, size_of, write_clips

from fv_distill.cli import generate
from fv_distill.data import ParquetDataset, write_rows
from fv_distill.evaluation.ways import make_way
from fv_distill.export import convert
from fv_distill.models import WanImageToVideoModel


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan_family")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def clips(directories, tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    return {name: write_clips(directory, root / name) for name, directory in directories.items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of one prompt and its first frame, of another size than the clips."""
    folder = tmp_path_factory.mktemp("prompts")
    picture = np.random.default_rng(1).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "first.png")
    path = folder / "prompts.json"
    path.write_text(json.dumps([{"caption": "a digit moving left", "image": "first.png"}]))
    return path


def sample(directory, prompts, **call):
    """By whatever pipeline the export names."""
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": Image.open(prompts.parent / "first.png")} if "ImageToVideo" in type(pipeline).__name__ else {}
    call = {**json.loads((directory / "fv_distill.json").read_text())["call"], **call}
    frames = pipeline(prompt="a digit", **image, **call, output_type="np", generator=torch.Generator().manual_seed(0))
    return pipeline, frames.frames


def run_card(exported):
    """What the snippet of an export's card leaves behind, with fewer steps; it writes to the working directory."""
    snippet = (exported / "README.md").read_text().split("```python")[1].split("```")[0]
    if "num_inference_steps" not in snippet:
        snippet = snippet.replace("    output_type=", "    num_inference_steps=2,\n    output_type=")
    scope = {}
    exec(compile(snippet, "card", "exec"), scope)
    assert Path("sample.gif").is_file()
    return scope


@pytest.mark.parametrize("run", RUNS)
def test_dmd2_trains_resumes_exports_and_samples(directories, clips, prompts, tmp_path, monkeypatch, run):
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
    pipeline, frames = sample(exported, prompts)
    assert frames.shape == (1, 9, size_of(name), size_of(name), 3)
    assert type(pipeline).__name__ == ("WanImageToVideoPipeline" if takes_image else "WanPipeline")
    trained = "transformer_2" if model.get("expert") == "low" else "transformer"
    base = DiffusionPipeline.from_pretrained(directories[name])
    for component in ("transformer", "transformer_2"):
        ours, theirs = getattr(pipeline, component, None), getattr(base, component, None)
        if theirs is not None:
            same = all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
            assert same == (component != trained), component
    card = (exported / "README.md").read_text()
    assert ("pipeline_tag: image-to-video" in card) == takes_image
    assert ("one of two networks that part at sigma 0.875" in card) == ("expert" in model)
    if "expert" in model:
        assert pipeline.config.boundary_ratio == 0.875
    monkeypatch.chdir(tmp_path)
    assert type(run_card(exported)["pipe"]) is type(pipeline)


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
    # The card names the base model as the Hub would.
    (tmp_path / directories[name].name).symlink_to(directories[name])
    monkeypatch.chdir(tmp_path)
    scope = run_card(exported)
    component = "transformer_2" if model.get("expert") == "low" else "transformer"
    assert getattr(scope["pipe"], component).peft_config
    weights = getattr(DiffusionPipeline.from_pretrained(merged), component).state_dict()
    before = getattr(DiffusionPipeline.from_pretrained(directories[name]), component).state_dict()
    changed = {key for key in weights if not torch.equal(weights[key], before[key])}
    assert changed and all(".to_" in key or ".add_" in key for key in changed)
    assert any(".add_k_proj" in key for key in changed) == (preset == "image_attention")


def test_roles_share_an_experts_network(directories, clips, tmp_path):
    """Student and critic as adapters on the low-noise expert, the teacher being that expert itself."""
    config = dmd2_config(directories["wan22_t2v"], clips["wan22_t2v"], tmp_path / "run")
    config["models"]["teacher"]["expert"] = "low"
    for role in ("student", "critic"):
        config["models"][role] = {
            "share_base_with": "teacher",
            "trainable": True,
            "lora": {"enable": True, "rank": 2},
        }
    config["method"]["rollout_mode"] = "data_latent"
    run_dir = train(config)
    metadata = json.loads((checkpoint(run_dir, 2) / "metadata.json").read_text())
    assert metadata["networks"]["student"]["component"] == "transformer_2"
    merged = convert(checkpoint(run_dir, 2), tmp_path / "merged", export_format="merged")
    ours, theirs = (DiffusionPipeline.from_pretrained(directory) for directory in (merged, directories["wan22_t2v"]))
    changed = {
        component: not all(
            torch.equal(a, b)
            for a, b in zip(getattr(ours, component).parameters(), getattr(theirs, component).parameters(), strict=True)
        )
        for component in ("transformer", "transformer_2")
    }
    assert changed == {"transformer": False, "transformer_2": True}


def test_a_checkpoint_of_the_other_expert_is_refused(directories, clips, tmp_path):
    config = finetune_config(directories["wan22_t2v"], clips["wan22_t2v"], tmp_path / "high", expert="high")
    high = train(config)
    config["models"]["student"]["expert"] = "low"
    resume = {
        "training.output_dir": str(tmp_path / "low"),
        "training.checkpoint.resume_from_checkpoint": str(checkpoint(high, 1)),
    }
    with pytest.raises(ValueError, match="holds a transformer as student, this run has a transformer_2"):
        train(config, resume)


def test_rows_of_text_alone_are_refused_before_training(directories, tmp_path):
    rows = [{"caption": "a digit", "text_embedding": torch.randn(4, TEXT_DIM)} for _ in range(2)]
    write_rows(tmp_path / "rows/rows.parquet", rows)
    config = dmd2_config(directories["wan21_i2v"], tmp_path / "rows", tmp_path / "run", **IMAGE)
    config["training"]["data"]["latent_shape"] = list(LATENT_SHAPE)
    with pytest.raises(ValueError, match="have no first_frame_latent, which WanImageToVideoModel"):
        train(config)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(("student", "teacher"), [(IMAGE, {}), ({}, IMAGE)])
def test_roles_that_see_different_things_are_refused(directories, clips, tmp_path, student, teacher):
    """TI2V 5B is both; a role without the image would be scored on other videos, silently."""
    config = dmd2_config(directories["ti2v"], clips["ti2v"], tmp_path / "run", **student)
    config["models"]["teacher"] = {"init_from": str(directories["ti2v"]), **teacher}
    with pytest.raises(ValueError, match="models.teacher is conditioned on .*; give both the same _target_"):
        train(config)


def test_diffusion_forcing_from_an_image(directories, clips, tmp_path):
    config = finetune_config(directories["ti2v"], clips["ti2v"], tmp_path / "run", **IMAGE)
    config["method"] = {"_target_": "fv_distill.methods.DiffusionForcingSFTMethod", "chunk_size": 1}
    assert all(np.isfinite(line["loss/student"]) for line in metrics(train(config)))


def test_captions_and_first_frames_are_enough_for_dmd2(directories, clips, tmp_path):
    dataset = ParquetDataset(clips["wan21_i2v"])
    kept = ("caption", "text_embedding", "first_frame_latent", "clip_feature")
    write_rows(
        tmp_path / "rows/rows.parquet",
        [{key: dataset[index][key] for key in kept} for index in range(len(dataset))],
    )
    config = dmd2_config(directories["wan21_i2v"], tmp_path / "rows", tmp_path / "run", **IMAGE)
    config["training"]["data"]["latent_shape"] = list(LATENT_SHAPE)
    assert len(metrics(train(config))) == 2


def kd_config(directory, rows, output_dir, **model):
    config = finetune_config(directory, rows, output_dir, **model)
    config["models"]["teacher"] = {"init_from": str(directory), **model}
    config["method"] = {
        "_target_": "fv_distill.methods.KDMethod",
        "teacher_path_cache": str(output_dir.with_name("paths")),
        "t_list": [1000, 500, 0],
        "teacher_inference_steps": 2,
    }
    return config


@pytest.mark.parametrize("name", ["wan21_i2v", "ti2v"])
def test_knowledge_distillation_from_an_image(directories, clips, tmp_path, name):
    run_dir = train(kd_config(directories[name], clips[name], tmp_path / "run", **IMAGE))
    assert all(np.isfinite(line["loss/student"]) for line in metrics(run_dir))
    if name == "ti2v":
        states = ParquetDataset(tmp_path / "paths")[0]["trajectory_latents"]
        # Another adapter on the same weights would have made other paths.
        with pytest.raises(ValueError, match="were made with models.teacher._target_="):
            train(kd_config(directories[name], clips[name], tmp_path / "other"))
        first = WanImageToVideoModel.from_pretrained(str(directories[name]), text_length=TEXT_LENGTH)
        latents = first.normalize_latents(ParquetDataset(clips[name])[0]["vae_latent"][None])
        torch.testing.assert_close(states[-1][:, 0], latents[0, :, 0], atol=1e-4, rtol=0)


def test_an_expert_makes_no_paths_for_knowledge_distillation(directories, clips, tmp_path):
    config = kd_config(directories["wan22_t2v"], clips["wan22_t2v"], tmp_path / "run", expert="high")
    with pytest.raises(ValueError, match="sampling paths go through all of them"):
        train(config)


def test_generate_wants_an_image_where_the_pipeline_does(directories, prompts, tmp_path, capsys):
    size = ["--height", "32", "--width", "32", "--num-frames", "9", "--num-inference-steps", "1", "--seed", "0"]
    words = ["--prompt", "a digit", "--output", str(tmp_path / "out.gif"), *size]
    image = ["--image", str(prompts.parent / "first.png")]
    generate(["--model", str(directories["wan21_i2v"]), *words, *image])
    assert (tmp_path / "out.gif").is_file()
    for model, more, message in (
        ("wan21_i2v", [], "give --image FILE"),
        ("wan22_t2v", image, "makes videos of text alone"),
        ("wan21_i2v", ["--image", "nowhere.png"], "no such file"),
    ):
        with pytest.raises(SystemExit):
            generate(["--model", str(directories[model]), *words, *more])
        captured = capsys.readouterr()
        assert message in " ".join((captured.out + captured.err).split())


def test_evaluation_refuses_what_it_can_not_show_an_image(directories):
    with pytest.raises(ValueError, match="makes videos of first frames; evaluate gives prompts alone"):
        make_way("model", directories["wan21_i2v"], steps=None, guidance=None, option="steps")
