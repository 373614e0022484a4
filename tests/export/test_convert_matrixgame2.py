import json

import pytest
import torch
from published_matrixgame2 import CONFIGS, published_shapes
from safetensors.torch import load_file, save_file
from tiny_matrixgame2 import ACTION_CONFIG, IMAGE_DIM, conditions, make_directory, make_network

from fv_distill import cli
from fv_distill.export import convert_matrixgame2 as module
from fv_distill.export.convert_matrixgame2 import convert_matrixgame2_checkpoint, streaming_info
from fv_distill.export.matrixgame2_keys import convert_state_dict, convert_state_dict_to_published, network_config
from fv_distill.generation import VideoStreamer
from fv_distill.models import CausalMatrixGame2Model, MatrixGame2Model
from fv_distill.schedules.shift import shift_sigma

CONFIG = {
    **CONFIGS["base_distilled_model"],
    "dim": 24,
    "num_heads": 2,
    "num_layers": 2,
    "ffn_dim": 48,
    "freq_dim": 32,
    "in_dim": 12,
    "out_dim": 4,
    "action_config": ACTION_CONFIG,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Stands for Wan 2.1 image-to-video, of which VAE and image encoder are taken."""
    return make_directory(tmp_path_factory.mktemp("base") / "wan", seed=1)


@pytest.fixture
def published(tmp_path):
    """A published folder: weights and config, of a network whose image encoder is as small as the fixture's."""
    folder = tmp_path / "base_distilled_model"
    folder.mkdir()
    weights = {
        f"model.{name}": torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.2
        for index, (name, shape) in enumerate(published_shapes(CONFIG, image_dim=IMAGE_DIM).items())
    }
    save_file(weights, folder / "base_distill.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(autouse=True)
def _small_image_encoder(monkeypatch):
    """A published config doesn't name the image encoder's width, as it is always CLIP ViT-H's."""
    monkeypatch.setattr(module, "network_config", lambda config: {**network_config(config), "image_dim": IMAGE_DIM})


def test_the_command_makes_a_directory_that_loads_streams_and_samples(published, base, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["--input", str(published / "base_distill.safetensors"), "--base-model", str(base), "--output", str(output)]
    cli.main(["convert-matrixgame2", *words])
    assert f"converted {published}" in capsys.readouterr().out.replace("\n", "")
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["README.md", "fv_distill.json", "image_encoder", "model_index.json", "scheduler", "transformer", "vae"]
    )
    model = MatrixGame2Model.from_pretrained(str(output))
    assert model.flow_shift == 5.0
    weights = load_file(published / "base_distill.safetensors")
    own = convert_state_dict_to_published(model.transformer.state_dict())
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], weights[name]) for name in weights)

    streamer = VideoStreamer.from_pretrained(output)
    assert isinstance(streamer.model, CausalMatrixGame2Model)
    assert (streamer.model.chunk_size, streamer.model.local_window, streamer.model.sink_frames) == (3, 3, 0)
    assert streamer.sigmas == tuple(shift_sigma(step / 1000, 5.0) for step in (1000, 666, 333))
    given = {name: value[0] for name, value in conditions(1).items() if name.endswith("_cond")}
    frames = streamer.generate(image=torch.full((3, 32, 32), 0.5), actions=given, num_frames=9, height=32, width=32)
    assert frames.shape == (9, 32, 32, 3)


def test_a_folder_and_another_type(published, base, tmp_path):
    output = convert_matrixgame2_checkpoint(published, tmp_path / "out", base_model=str(base), dtype="bfloat16")
    written = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert written["blocks.0.scale_shift_table"].dtype == torch.float32


def test_weights_that_do_not_fit_are_listed_in_published_names(published, base, tmp_path):
    path = published / "base_distill.safetensors"
    weights = load_file(path)
    weights["model.blocks.0.action_model.extra.weight"] = torch.ones(1)
    weights["model.head.head.weight"] = torch.ones(2, 2)
    del weights["model.blocks.1.self_attn.q.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError) as caught:
        convert_matrixgame2_checkpoint(path, tmp_path / "out", base_model=str(base))
    message = str(caught.value)
    assert "missing blocks.1.self_attn.q.weight" in message
    assert "unexpected blocks.0.action_model.extra.weight" in message
    assert "head.head.weight has shape (2, 2), expected (16, 24)" in message
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(published, base, tmp_path):
    (published / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match="no config.json or base_config.json; give the published one with"):
        convert_matrixgame2_checkpoint(published, tmp_path / "out", base_model=str(base))
    text_only = tmp_path / "text_only"
    (text_only / "vae").mkdir(parents=True)
    (text_only / "model_index.json").write_text("{}")
    (text_only / "vae" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has no image_encoder; give Wan 2.1 image-to-video"):
        convert_matrixgame2_checkpoint(
            published, tmp_path / "out", base_model=str(text_only), config=tmp_path / "elsewhere.json"
        )
    with pytest.raises(ValueError, match="the config lacks dim, in_dim"):
        network_config({})


@pytest.mark.parametrize(
    ("variant", "window", "steps", "actions"),
    [
        ("base_distilled_model", 3, 3, ["mouse_cond", "keyboard_cond"]),
        ("gta_distilled_model", 1, 3, ["mouse_cond", "keyboard_cond"]),
        ("templerun_distilled_model", 3, 4, ["keyboard_cond"]),
    ],
)
def test_published_variants_are_streamed_as_published(variant, window, steps, actions):
    info = streaming_info(CONFIGS[variant], base_model="x/y", sigmas=None)
    assert info is not None and info.causal is not None and info.sigmas is not None
    assert (info.causal["local_window"], len(info.sigmas)) == (window, steps)
    assert list(info.actions) == actions and info.needs_image and not info.reads_text


def test_the_foundation_model_is_not_streamed():
    assert streaming_info(CONFIGS["base_model"], base_model="x/y", sigmas=None) is None
    with pytest.raises(ValueError, match="the network is not causal"):
        streaming_info(CONFIGS["base_model"], base_model="x/y", sigmas=(1.0,))


def test_names_go_there_and_back_and_unknown_ones_are_listed():
    weights = make_network().state_dict()
    there = {name.removeprefix("model."): value for name, value in convert_state_dict_to_published(weights).items()}
    assert convert_state_dict(there).keys() == weights.keys()
    with pytest.raises(ValueError, match=r"not a key of the published Matrix-Game 2 layout: scale_shift_table, "):
        convert_state_dict(weights)
