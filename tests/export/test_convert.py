import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file
from tiny_models import make_tiny_transformer

from fv_distill.export import convert, load_role_weights
from fv_distill.export.call_arguments import training_call_arguments
from fv_distill.training.checkpoint_storage import ChunkWriter


@pytest.fixture
def checkpoint(tiny_wan, tmp_path):
    """A checkpoint as training writes it: student, critic and EMA, and an optimizer."""
    directory = tmp_path / "checkpoints" / "step-00000002"
    names = ("student", "critic", "ema")
    groups = {name: make_tiny_transformer(seed=10 + index).state_dict() for index, name in enumerate(names)}
    writer = ChunkWriter(directory, copy=False)
    writer.plan(groups | {"student.optimizer": {"blocks.0.norm2.weight/step": torch.tensor(2.0)}})
    writer.write()
    (directory / "tensors.json").write_text(writer.index)
    write_metadata(directory, tiny_wan)
    return directory


def write_metadata(directory, tiny_wan):
    metadata = {
        "format": 2,
        "step": 2,
        "models": ["student", "critic", "ema"],
        "lora": {},
        "few_step": {"sigmas": [1.0, 0.75], "sample_type": "ode", "guidance_scale": 1.0},
        "latent_shape": [4, 3, 4, 4],
        "versions": {},
        "updates": {"student": 1, "critic": 2},
        "global_batch_size": 4,
        "world_size": 2,
        "config": {
            "models": {"student": {"init_from": str(tiny_wan)}, "critic": {"init_from": str(tiny_wan)}},
            "method": {"_target_": "fv_distill.methods.DMD2Method"},
            "training": {
                "seed": 3,
                "data": {"data_path": "/home/me/clips", "text_length": 8},
                "loop": {"gradient_accumulation_steps": 1},
                "optimizer": {"_target_": "torch.optim.AdamW", "learning_rate": 1e-5},
            },
            "callbacks": {},
            "pipeline": {"push_to_hub": False, "hub_model_id": "me/student"},
        },
    }
    (directory / "metadata.json").write_text(json.dumps(metadata))


def assert_weights(weights, seed):
    expected = make_tiny_transformer(seed).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("name", "seed"), [("student", 10), ("critic", 11), ("ema", 12)])
def test_networks_are_found_by_name(checkpoint, name, seed, recwarn):
    assert_weights(load_role_weights(checkpoint, name), seed)
    # What one process wrote is a plain file of weights for any other program.
    assert_weights(load_file(checkpoint / f"{name}-00000.safetensors"), seed)
    assert not recwarn.list


def test_an_older_format_is_refused(checkpoint):
    change_metadata(checkpoint, format=1, versions={"fv_distill": "0.0.9"})
    message = r"has format 1; this version of fv_distill reads 2\..*the version that wrote it \(fv_distill 0\.0\.9\)"
    with pytest.raises(ValueError, match=message):
        load_role_weights(checkpoint, "student")


@pytest.mark.parametrize(("options", "seed"), [({}, 12), ({"ema": False}, 10), ({"role": "critic"}, 11)])
def test_convert_takes_the_right_network(checkpoint, tmp_path, options, seed):
    directory = convert(checkpoint, tmp_path / "out", **options)
    assert_weights(load_file(directory / "transformer/diffusion_pytorch_model.safetensors"), seed)
    info = json.loads((directory / "fv_distill.json").read_text())
    assert info["sigmas"] == (None if "role" in options else [1.0, 0.75])
    few_step = {} if "role" in options else {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert info["call"] == {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8, **few_step}
    assert info["averaged"] is (seed == 12)


@pytest.mark.parametrize("push", [False, True])
def test_the_card_loads_from_where_the_export_goes(checkpoint, tmp_path, push):
    config = json.loads((checkpoint / "metadata.json").read_text())["config"]
    config["pipeline"]["push_to_hub"] = push
    change_metadata(checkpoint, config=config)
    card = (convert(checkpoint, tmp_path / "out") / "README.md").read_text()
    assert f'from_pretrained("{"me/student" if push else "out"}"' in card


def test_incomplete_checkpoints_are_refused(checkpoint, tmp_path):
    (checkpoint / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match="never completed"):
        convert(checkpoint, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_unknown_roles_are_listed(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="it has student, critic, ema"):
        load_role_weights(checkpoint, "teacher")
    for role in ("teacher", "ema"):
        with pytest.raises(ValueError, match=f"no role '{role}'; it has student, critic$"):
            convert(checkpoint, tmp_path / "out", role=role)


def test_without_averaged_weights_the_latest_are_taken_and_it_is_said(checkpoint, tmp_path, capsys):
    change_metadata(checkpoint, models=["student", "critic"])
    directory = convert(checkpoint, tmp_path / "out")
    assert_weights(load_file(directory / "transformer/diffusion_pytorch_model.safetensors"), 10)
    assert "no averaged weights" in capsys.readouterr().out


def test_a_config_tells_where_the_base_model_is_now(checkpoint, tiny_wan, tmp_path):
    config = json.loads((checkpoint / "metadata.json").read_text())["config"]
    config["models"]["student"]["init_from"] = "moved/away"
    change_metadata(checkpoint, config=config)
    with pytest.raises(FileNotFoundError, match=r"(?s)models\.student: .*moved/away.*give --config"):
        convert(checkpoint, tmp_path / "out")
    run = {
        "models": {
            "student": {"init_from": str(tiny_wan), "trainable": True},
            "critic": {"init_from": str(tiny_wan), "trainable": True},
            "teacher": {"init_from": str(tiny_wan)},
        },
        "method": {"_target_": "fv_distill.methods.DMD2Method"},
        "training": {"output_dir": "out", "data": {"data_path": "rows"}, "loop": {"max_train_steps": 2}},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    directory = convert(checkpoint, tmp_path / "out", config=tmp_path / "run.yaml")
    assert json.loads((directory / "fv_distill.json").read_text())["base_model"] == tiny_wan.name


def test_without_temporal_folding_the_pipeline_still_makes_the_trained_frames(tiny_wan, tmp_path):
    """The digits' autoencoder folds no frames; the frame count that others ask for would give one frame too many."""
    base = shutil.copytree(tiny_wan, tmp_path / "base")
    config = json.loads((base / "vae/config.json").read_text())
    config |= {"temperal_downsample": [False, False, False], "scale_factor_temporal": 1}
    for factor, directory in ((4, tiny_wan), (1, base)):
        if factor == 1:
            AutoencoderKLWan.from_config(config).save_pretrained(base / "vae")
        call = training_call_arguments(directory, (4, 3, 4, 4), text_length=8)
        pipeline = WanPipeline.from_pretrained(directory)
        latents = pipeline("a", num_inference_steps=1, guidance_scale=1.0, output_type="latent", **call).frames
        assert pipeline.vae_scale_factor_temporal == factor and latents.shape == (1, 4, 3, 4, 4)


def change_metadata(directory, **changes):
    path = directory / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
