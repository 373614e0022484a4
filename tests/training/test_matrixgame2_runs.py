"""Matrix-Game 2 through every method: two steps, saved, resumed, exported, sampled."""

import json

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_matrixgame2 import KEYS, NUM_FRAMES, make_directory, make_rows

from fv_distill import cli
from fv_distill.export import convert
from fv_distill.export.matrixgame2_keys import convert_state_dict
from fv_distill.export.sampling_snippet import sampling_snippet
from fv_distill.export.student_info import read_info
from fv_distill.generation import VideoStreamer
from fv_distill.models import CausalMatrixGame2Model, MatrixGame2Model
from fv_distill.models.pipelines import MatrixGame2Pipeline
from fv_distill.training import run_training_from_config

CONFIGS = {
    "finetune": tiny_runs.finetune_config,
    "dfsft": tiny_runs.dfsft_config,
    "kd": tiny_runs.kd_config,
    "kd_causal": tiny_runs.causal_kd_config,
    "dmd2": tiny_runs.dmd2_config,
    "dmd2_lora": tiny_runs.shared_base_config,
    "self_forcing": tiny_runs.self_forcing_config,
    "self_forcing_lora": tiny_runs.shared_causal_base_config,
}
GUIDED = ("dmd2", "self_forcing")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("tiny") / "matrixgame2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("data") / "rows")


def run_config(name, model, rows, output_dir):
    """The tiny config of a method with this family's adapters."""
    config = CONFIGS[name](model, rows, output_dir)
    for role in config["models"].values():
        is_causal = "chunk_size" in role
        role["_target_"] = f"fv_distill.models.{'Causal' if is_causal else ''}MatrixGame2Model"
        role.pop("negative_prompt", None)
    if name.startswith(GUIDED):
        config["method"]["cfg_uncond"] = {"action": "zero"}
    if name.startswith("kd"):
        config["method"]["teacher_guidance_scale"] = 1.0
    config["training"]["loop"]["max_train_steps"] = 2
    config["training"]["checkpoint"]["every_steps"] = 1
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_of_every_method(name, model, rows, tmp_path):
    out = tiny_runs.train(run_config(name, model, rows, tmp_path / "run"))
    lines = tiny_runs.metrics(out)
    assert len(lines) == 2
    assert all(np.isfinite(value) for line in lines for key, value in line.items() if key.startswith("loss/"))
    metadata = tiny_runs.metadata(tiny_runs.checkpoint(out, 2))
    assert metadata["conditions"]["keyboard_cond"] == [NUM_FRAMES, KEYS]
    before, after = (tiny_runs.groups(tiny_runs.checkpoint(out, step))["student"] for step in (1, 2))
    assert tiny_runs.largest_difference(before, after) > 0


@pytest.mark.parametrize("name", ["finetune", "self_forcing"])
def test_a_resumed_run_is_the_uninterrupted_one(name, model, rows, tmp_path):
    whole = tiny_runs.train(run_config(name, model, rows, tmp_path / "whole"))
    config = run_config(name, model, rows, tmp_path / "parts")
    tiny_runs.train(config, {"training.loop.max_train_steps": 1})
    parts = tiny_runs.train(config, {"training.checkpoint.resume_from_checkpoint": "latest"})
    ours, theirs = (tiny_runs.groups(tiny_runs.checkpoint(out, 2)) for out in (whole, parts))
    for group in ours:
        tiny_runs.assert_same_tensors(ours[group], theirs[group])


@pytest.mark.parametrize("name", ["dmd2", "self_forcing"])
def test_a_dry_run_estimates_it(name, model, rows, tmp_path, capsys):
    path = tiny_runs.write_config(run_config(name, model, rows, tmp_path / "run"), tmp_path / "run.yaml")
    run_training_from_config(path, dry_run=True)
    text = capsys.readouterr().out
    assert "network calls of the average step" in text and "nothing was trained" in text
    assert ("KV cache" in text) == (name == "self_forcing")


@pytest.fixture(scope="module")
def few_step(model, rows, tmp_path_factory):
    """The checkpoint of a DMD2 run."""
    folder = tmp_path_factory.mktemp("dmd2")
    return tiny_runs.checkpoint(tiny_runs.train(run_config("dmd2", model, rows, folder / "run")), 2)


@pytest.fixture(scope="module")
def causal_export(model, rows, tmp_path_factory):
    """The export of a Self-Forcing run."""
    folder = tmp_path_factory.mktemp("self_forcing")
    out = tiny_runs.train(run_config("self_forcing", model, rows, folder / "run"))
    return convert(tiny_runs.checkpoint(out, 2), folder / "export")


@pytest.fixture
def files(tmp_path):
    """A first frame and actions, as a user has them."""
    from PIL import Image

    Image.new("RGB", (50, 40), "red").save(tmp_path / "first.png")
    keyboard = np.zeros((13, KEYS))
    keyboard[:, 0] = 1
    np.savez(tmp_path / "actions.npz", keyboard=keyboard, mouse=np.full((13, 2), 0.1))
    return ["--image", str(tmp_path / "first.png"), "--actions", str(tmp_path / "actions.npz")]


def generate(export, files, output, *words):
    cli.main(["generate", "--model", str(export), *files, "--output", str(output), "--debug", *words])


def test_a_few_step_students_export_is_sampled(few_step, files, tmp_path, capsys):
    export = convert(few_step, tmp_path / "export")
    index = json.loads((export / "model_index.json").read_text())
    assert index["_class_name"] == "MatrixGame2Pipeline"
    assert index["transformer"][1] == "MatrixGame2Transformer3DModel"
    info = read_info(export)
    assert info.actions == {"mouse_cond": [NUM_FRAMES, 2], "keyboard_cond": [NUM_FRAMES, KEYS]}
    assert info.needs_image and not info.reads_text
    assert "max_sequence_length" not in info.call
    again = MatrixGame2Model.from_pretrained(str(export))
    written = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    assert again.transformer.state_dict().keys() == written.keys()
    generate(export, files, tmp_path / "out.gif")
    assert "9 frames" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["few_step", "causal_export"])
def test_the_cards_snippet_runs(kind, request, tmp_path, monkeypatch):
    value = request.getfixturevalue(kind)
    export = value if kind == "causal_export" else convert(value, tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    code = sampling_snippet(read_info(export), name=str(export))
    assert "keyboard_cond = torch.zeros(9, 3)" in (export / "README.md").read_text()
    exec(compile(code, "snippet", "exec"), {})
    assert (tmp_path / "sample.gif").is_file()
    assert "pipeline_tag: image-to-video" in (export / "README.md").read_text()


def test_published_names_on_export(few_step, tmp_path):
    path = convert(few_step, tmp_path / "student.safetensors", export_format="original")
    weights = load_file(path)
    assert all(name.startswith("model.") for name in weights)
    assert "model.blocks.0.action_model.t_qkv.weight" in weights and "model.blocks.1.self_attn.q.weight" in weights
    own = convert_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    expected = load_file(convert(few_step, tmp_path / "x") / "transformer" / "diffusion_pytorch_model.safetensors")
    tiny_runs.assert_same_tensors(own, expected)


def test_a_lora_is_loaded_by_the_pipeline_and_merged(model, rows, tmp_path):
    config = run_config("finetune", model, rows, tmp_path / "run")
    config["models"]["student"]["lora"] = {"enable": True, "rank": 2, "target_modules": "all"}
    checkpoint = tiny_runs.checkpoint(tiny_runs.train(config, {"training.optimizer.learning_rate": 0.1}), 2)
    lora = convert(checkpoint, tmp_path / "lora")
    merged = convert(checkpoint, tmp_path / "merged", export_format="merged")
    frames = []
    call = {"num_inference_steps": 1, "height": 32, "width": 32, "num_frames": 9, "output_type": "latent"}
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for directory in (model, merged, model):
        pipeline = MatrixGame2Pipeline.from_pretrained(directory)
        if len(frames) == 2:
            pipeline.load_lora_weights(lora)
        frames.append(pipeline(torch.rand(1, 3, 32, 32).fill_(0.3), latents=noise, **call).frames)
    torch.testing.assert_close(frames[2], frames[1], atol=1e-4, rtol=0)
    assert (frames[0] - frames[1]).abs().max() > 1e-3


def test_a_causal_student_is_streamed_with_actions(causal_export, files, tmp_path, capsys):
    generate(causal_export, files, tmp_path / "out.gif", "--stream")
    # As long as the actions: 13 frames are 4 chunks of a latent frame.
    text = capsys.readouterr().out
    assert "chunk 4: 4 frames" in text and "13 frames" in text


def streamed(export, **options):
    streamer = VideoStreamer.from_pretrained(export)
    assert isinstance(streamer.model, CausalMatrixGame2Model)
    return streamer.generate(image=torch.full((3, 32, 32), 0.3), height=32, width=32, **options)


def actions(frames, *, pressed_from=None):
    keyboard = torch.zeros(frames, KEYS)
    if pressed_from is not None:
        keyboard[pressed_from:] = 5.0
    return {"mouse_cond": torch.zeros(frames, 2), "keyboard_cond": keyboard}


def test_streamed_frames_follow_actions_and_no_later_ones(causal_export):
    still = streamed(causal_export, actions=actions(13)).astype(int)
    moved = streamed(causal_export, actions=actions(13, pressed_from=6)).astype(int)
    differs = np.abs(still - moved).reshape(13, -1).max(axis=1) > 0
    # Frame 6 is shown by the latent frame of frames 5 to 8, whose chunk reads it.
    assert not differs[:5].any() and differs[5:].any()


def test_what_a_player_does_reaches_the_next_chunk(causal_export):
    streamer = VideoStreamer.from_pretrained(causal_export)
    shape, _ = streamer.plan(num_frames=13)

    def chunks(*, played):
        conditions = streamer.encode_conditions(shape, image=torch.full((3, 32, 32), 0.3), actions=actions(13))
        made = []
        for chunk in streamer.stream_latents("", shape, conditions=conditions):
            made.append(chunk)
            if played and len(made) == 2:
                conditions["keyboard_cond"][:, 5:] = 5.0
        return made

    still, moved = chunks(played=False), chunks(played=True)
    equal = [torch.equal(one, other) for one, other in zip(still, moved, strict=True)]
    assert equal == [True, True, False, False]


def test_generation_names_what_is_missing(causal_export, few_step, files, tmp_path):
    with pytest.raises(ValueError, match="no first_frame_latent, which CausalMatrixGame2Model"):
        streamed_without = VideoStreamer.from_pretrained(causal_export)
        streamed_without.generate(num_frames=9)
    with pytest.raises(ValueError, match="mouse_cond has 9 rows, but the video 13 frames"):
        streamed(causal_export, actions=actions(9), num_frames=13)
    with pytest.raises(ValueError, match=r"guidance_scale=3, but CausalMatrixGame2Model reads no text"):
        streamed(causal_export, actions=actions(9), guidance_scale=3.0)
    export = convert(few_step, tmp_path / "export")
    with pytest.raises(ValueError, match="the model's MatrixGame2Pipeline makes videos of a first frame; give --image"):
        generate(export, [], tmp_path / "out.gif")
    for model in (export, causal_export):
        with pytest.raises(ValueError, match="--prompt 'a cat', but the model reads no text"):
            generate(model, files, tmp_path / "out.gif", "--prompt", "a cat")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match="holds neither `mouse` nor `keyboard`"):
        generate(export, [*files[:2], "--actions", str(tmp_path / "empty.json")], tmp_path / "out.gif")


def test_models_of_text_take_no_image_and_no_actions(tiny_wan, tiny_rows, files, tmp_path):
    config = tiny_runs.self_forcing_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["loop"]["max_train_steps"] = 1
    export = convert(tiny_runs.checkpoint(tiny_runs.train(config), 1), tmp_path / "export")
    for given, message in (
        (files[:2], "an image was given, but CausalWanModel goes on from none"),
        (files[2:], "mouse_cond was given, but this CausalWanModel reads text alone"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(export, given, tmp_path / "out.gif", "--prompt", "a digit")
    with pytest.raises(ValueError, match="give --prompt"):
        generate(export, [], tmp_path / "out.gif")
    with pytest.raises(ValueError, match=r"--actions .*, but a WanPipeline takes no mouse_cond"):
        generate(tiny_wan, files[2:], tmp_path / "out.gif", "--prompt", "a digit")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("finetune", {"training.data.caption_dropout": 0.1}, "reads no text; leave the key out"),
        ("dmd2", {"method.cfg_uncond.action": "keep"}, "both passes would be the same"),
        ("kd", {"method.teacher_guidance_scale": 3.0}, "reads no text, and paths are guided away"),
        (
            "finetune",
            {"callbacks.validation": {"dataset_file": "prompts.txt", "every_steps": 1}},
            "reads first frames and actions instead",
        ),
    ],
)
def test_what_has_no_meaning_without_text_is_refused(name, overrides, message, model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match=message):
        tiny_runs.train(run_config(name, model, rows, tmp_path / "run"), overrides)


def test_text_is_still_required_where_it_is_read(tiny_wan, rows, tmp_path):
    with pytest.raises(ValueError, match="text_embedding: it is empty"):
        tiny_runs.train(tiny_runs.finetune_config(tiny_wan, rows, tmp_path / "run"))


def test_rows_of_another_family_are_refused(model, tiny_rows, tmp_path):
    with pytest.raises(ValueError, match="no first_frame_latent, which MatrixGame2Model"):
        tiny_runs.train(run_config("finetune", model, tiny_rows, tmp_path / "run"))
