import json
import re
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from original_wan import OriginalWan
from safetensors.torch import load_file, save_file
from tiny_models import LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH, make_tiny_transformer

from fv_distill import cli
from fv_distill.export import convert_state_dict, convert_wan_checkpoint, convert_wan_to_original
from fv_distill.generation import VideoStreamer


def make_original(seed: int) -> OriginalWan:
    """The tiny directory's network in the original layout."""
    torch.manual_seed(seed)
    return OriginalWan(
        dim=24,
        heads=2,
        ffn_dim=48,
        num_layers=2,
        in_dim=LATENT_CHANNELS,
        out_dim=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
    )


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) and actual[key].dtype == value.dtype for key, value in expected.items())


@pytest.fixture
def ode_init(tmp_path):
    """A checkpoint as Self-Forcing writes it."""
    state = {f"model.{key}": value for key, value in make_original(7).state_dict().items()}
    path = tmp_path / "in" / "ode_init.pt"
    path.parent.mkdir()
    torch.save({"generator": state, "step": 10}, path)
    return path


def run(*words) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fv_distill", "convert-wan", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_end_to_end_and_back(ode_init, tiny_wan, tmp_path):
    done = run("--input", ode_init, "--output", tmp_path / "out", "--base-model", tiny_wan)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"took generator of {ode_init}\nconverted {ode_init} to {tmp_path / 'out'}\n"

    original = make_original(7)
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, LATENT_CHANNELS, 3, 4, 4), (2, 6, TEXT_DIM)))
    timestep = torch.tensor([900.0, 125.0])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline) is WanPipeline and type(pipeline.transformer) is WanTransformer3DModel
    with torch.no_grad():
        (actual,) = pipeline.transformer(x, timestep, text, return_dict=False)
        torch.testing.assert_close(actual, original(x, timestep, text), atol=1e-5, rtol=1e-5)
    frames = pipeline(
        "a digit", height=32, width=32, num_frames=9, num_inference_steps=2, max_sequence_length=TEXT_LENGTH
    ).frames
    assert frames.shape == (1, 9, 32, 32, 3)

    done = run("--input", tmp_path / "out", "--output", tmp_path / "back.safetensors", "--to-original")
    assert done.returncode == 0, done.stderr
    assert_same(load_file(tmp_path / "back.safetensors"), original.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "in", "out"]


def test_all_but_the_transformer_is_the_base_models(ode_init, tiny_wan, tmp_path):
    directory = convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tiny_wan))

    def files(root):
        found = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        return {path: (root / path).read_bytes() for path in found if path.parts[0] != "transformer"}

    written, base = files(directory), files(tiny_wan)
    card = written.pop(next(path for path in written if path.name == "README.md")).decode()
    assert written == base
    assert "`ode_init.pt` (its `generator`)" in card
    # Not a student of this library, of which it would know how to be sampled.
    assert not (directory / "fv_distill.json").exists()


def test_a_base_that_is_an_export_does_not_lend_its_description(ode_init, tiny_wan, tmp_path):
    base = convert_wan_checkpoint(ode_init, tmp_path / "base", base_model=str(tiny_wan))
    (base / "fv_distill.json").write_text('{"sigmas": [1.0]}')
    directory = convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(base))
    assert not (directory / "fv_distill.json").exists()


def test_a_causal_checkpoint_can_be_streamed(ode_init, tiny_wan, tmp_path):
    words = ["--input", ode_init, "--output", tmp_path / "out", "--base-model", tiny_wan]
    done = run(*words, "--chunk-size", 1, "--sigmas", 1, 0.9375, 0.833333, 0.625, "--local-window", 2)
    assert done.returncode == 0, done.stderr
    streamer = VideoStreamer.from_pretrained(tmp_path / "out")
    assert streamer.sigmas == (1.0, 0.9375, 0.833333, 0.625) and streamer.sample_type == "sde"
    assert (streamer.model.chunk_size, streamer.model.local_window, streamer.model.sink_frames) == (1, 2, 0)
    weights = convert_state_dict(make_original(7).state_dict())
    assert_same(streamer.model.transformer.state_dict(), weights)
    assert streamer.generate("a digit", num_frames=9, height=32, width=32).shape == (9, 32, 32, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sigmas", 1, 0.5], "describe a causal network: add its --chunk-size"),
        (["--chunk-size", 3, "--sigmas", 0.9, 0.5], "sigmas [0.9, 0.5] must fall from 1"),
        (["--chunk-size", 3, "--sigmas", 1, 0], "sigmas [1.0, 0.0] must fall from 1"),
        (["--chunk-size", 0], "chunk_size=0 must be at least 1 latent frame"),
    ],
)
def test_mistakes_about_streaming_are_named(ode_init, tiny_wan, tmp_path, words, message, capsys):
    command = ["convert-wan", "--input", ode_init, "--output", tmp_path / "out", "--base-model", tiny_wan, *words]
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in command])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_other_formats(tiny_wan, tmp_path, suffix):
    weights = make_original(7).state_dict()
    (torch.save if suffix == "pth" else save_file)(weights, tmp_path / f"wan.{suffix}")
    directory = convert_wan_checkpoint(tmp_path / f"wan.{suffix}", tmp_path / "out", base_model=str(tiny_wan))
    back = convert_wan_to_original(directory, tmp_path / "new" / "back.safetensors")
    assert_same(load_file(back), weights)


def test_weights_that_share_or_transpose_memory_are_written(tiny_wan, tmp_path):
    """Views into one large tensor, as sharded training leaves them, and a transposed one."""
    weights = make_original(7).state_dict()
    flat = torch.cat([value.flatten() for value in weights.values()])
    pieces = flat.split([value.numel() for value in weights.values()])
    views = {key: piece.view(weights[key].shape) for key, piece in zip(weights, pieces, strict=True)}
    views["head.head.weight"] = weights["head.head.weight"].t().contiguous().t()
    torch.save(views, tmp_path / "wan.pt")
    directory = convert_wan_checkpoint(tmp_path / "wan.pt", tmp_path / "out", base_model=str(tiny_wan))
    assert_same(load_file(convert_wan_to_original(directory, tmp_path / "back.safetensors")), weights)


def test_dtype_in_both_directions(ode_init, tiny_wan, tmp_path):
    directory = convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tiny_wan), dtype="bfloat16")
    weights = load_file(directory / "transformer/diffusion_pytorch_model.safetensors")
    kept = {key for key, value in weights.items() if value.dtype == torch.float32}
    assert {"scale_shift_table", "blocks.1.norm2.weight"} <= kept
    assert {value.dtype for key, value in weights.items() if key not in kept} == {torch.bfloat16}
    back = load_file(convert_wan_to_original(directory, tmp_path / "a.safetensors"))
    assert back["head.modulation"].dtype == torch.float32 and back["head.head.weight"].dtype == torch.bfloat16
    half = load_file(convert_wan_to_original(directory, tmp_path / "b.safetensors", dtype="float16"))
    assert half["blocks.0.norm3.weight"].dtype == torch.float32 and half["head.head.weight"].dtype == torch.float16


def make_two_network_directory(tiny_wan, path):
    """As Wan 2.2 A14B has it."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_wan)
    WanPipeline(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=make_tiny_transformer(1),
        transformer_2=make_tiny_transformer(2),
        boundary_ratio=0.875,
    ).save_pretrained(path)
    return path


def test_two_networks_one_after_the_other(tiny_wan, tmp_path):
    base = make_two_network_directory(tiny_wan, tmp_path / "base")
    for name, seed in (("high_noise_model", 3), ("low_noise_model", 4)):
        (tmp_path / name).mkdir()
        save_file(make_original(seed).state_dict(), tmp_path / name / "diffusion_pytorch_model.safetensors")
    high = convert_wan_checkpoint(tmp_path / "high_noise_model", tmp_path / "high", base_model=str(base))
    both = convert_wan_checkpoint(
        tmp_path / "low_noise_model", tmp_path / "both", base_model=str(high), component="transformer_2"
    )
    pipeline = DiffusionPipeline.from_pretrained(both)
    assert pipeline.config.boundary_ratio == 0.875
    for name, component, seed in (("a", "transformer", 3), ("b", "transformer_2", 4)):
        back = convert_wan_to_original(both, tmp_path / f"{name}.safetensors", component=component)
        assert_same(load_file(back), make_original(seed).state_dict())


@pytest.mark.parametrize("component", ["vae", "transformer_3"])
def test_an_unknown_component_is_refused(ode_init, tiny_wan, tmp_path, component):
    message = rf"component '{component}' of .* can't be converted: its WanTransformer3DModel is transformer$"
    with pytest.raises(ValueError, match=message):
        convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tiny_wan), component=component)
    with pytest.raises(ValueError, match=message):
        convert_wan_to_original(tiny_wan, tmp_path / "out.safetensors", component=component)


def test_a_base_that_is_no_wan_is_refused(ode_init, tmp_path):
    (tmp_path / "base").mkdir()
    index = {"_class_name": "P", "transformer": ["diffusers", "LTXVideoTransformer3DModel"], "boundary_ratio": None}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="it has no WanTransformer3DModel"):
        convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tmp_path / "base"))


def test_keys_that_do_not_fit_are_listed_in_the_files_names(tiny_wan, tmp_path):
    weights = make_original(7).state_dict()
    weights["img_emb.proj.0.weight"] = weights.pop("blocks.0.norm3.bias")
    weights["head.modulation"] = weights["head.modulation"][..., :5]
    torch.save(weights, tmp_path / "wan.pt")
    done = run("--input", tmp_path / "wan.pt", "--output", tmp_path / "out", "--base-model", tiny_wan)
    assert done.returncode == 2
    # Packages may have warned before, torchao for instance.
    assert done.stderr.endswith(
        f"error: {tmp_path / 'wan.pt'} and {tiny_wan}: the weights don't fit the network: missing blocks.0.norm3.bias; "
        "unexpected img_emb.proj.0.weight; head.modulation has shape (1, 2, 5), expected (1, 2, 24)\n"
        "(--debug shows the traceback)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["wan.pt"]


def test_of_many_keys_that_do_not_fit_each_kind_is_shown(tiny_wan, tmp_path):
    torch.save({f"transformer.{key}": value for key, value in make_original(7).state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(ValueError) as caught:
        convert_wan_checkpoint(tmp_path / "a.pt", tmp_path / "out", base_model=str(tiny_wan))
    message = str(caught.value)
    assert re.search(r"missing patch_embedding\.weight; .* and 61 more missing; unexpected transformer\.patch", message)
    assert message.endswith(" and 61 more unexpected")
    directory = convert_wan_checkpoint(tmp_path / "a.pt", tmp_path / "out", base_model=str(tiny_wan), key="transformer")
    assert directory.is_dir()


def test_diffusers_weights_are_recognised(tiny_wan, tmp_path):
    file = tiny_wan / "transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="have diffusers' names already; there is nothing to convert"):
        convert_wan_checkpoint(file, tmp_path / "out", base_model=str(tiny_wan))


def test_a_directory_whose_weights_do_not_fit_its_config(tiny_wan, ode_init, tmp_path):
    directory = convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tiny_wan))
    file = directory / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.bias"]
    file.unlink()
    save_file(weights, file)
    with pytest.raises(
        ValueError, match=r"out/transformer: the weights don't fit the network: missing proj_out\.bias$"
    ):
        convert_wan_to_original(directory, tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


def test_a_key_that_is_not_there_and_the_choice_among_several(tiny_wan, tmp_path, capsys):
    entries = {
        name: make_original(seed).state_dict() for seed, name in enumerate(("critic", "generator_ema", "generator"))
    }
    torch.save(entries, tmp_path / "run.pt")
    arguments = ["--input", str(tmp_path / "run.pt"), "--base-model", str(tiny_wan), "--output"]
    cli.main(["convert-wan", *arguments, str(tmp_path / "a")])
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"took generator_ema of {tmp_path / 'run.pt'}; it also has critic, generator (choose with --key)"
    cli.main(["convert-wan", *arguments, str(tmp_path / "b"), "--key", "generator"])
    for name, seed in (("a", 1), ("b", 2)):
        back = convert_wan_to_original(tmp_path / name, tmp_path / f"{name}.safetensors")
        assert_same(load_file(back), make_original(seed).state_dict())
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert-wan", *arguments, str(tmp_path / "c"), "--key", "student"])
    assert caught.value.code == 2
    assert "no entry 'student'; it has critic, generator_ema, generator" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no entry 'student'"):
        cli.main(["convert-wan", *arguments, str(tmp_path / "c"), "--key", "student", "--debug"])


def test_nothing_is_replaced_unasked(ode_init, tiny_wan, tmp_path):
    directory = convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tiny_wan))
    file = convert_wan_to_original(directory, tmp_path / "back.safetensors")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert_wan_checkpoint(ode_init, directory, base_model=str(tiny_wan))
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert_wan_to_original(directory, file)
    (directory / "left_over.txt").write_text("of the older one")
    file.write_bytes(b"of the older one")
    convert_wan_checkpoint(ode_init, directory, base_model=str(tiny_wan), overwrite=True)
    assert not (directory / "left_over.txt").exists()
    convert_wan_to_original(directory, file, overwrite=True)
    assert_same(load_file(file), make_original(7).state_dict())
    with pytest.raises(FileExistsError, match="something else"):
        convert_wan_checkpoint(ode_init, ode_init.parent.parent, base_model=str(tiny_wan), overwrite=True)


def test_input_and_output_may_not_lie_in_each_other(ode_init, tiny_wan, tmp_path):
    directory = convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tiny_wan))
    inside = directory / "ode_init.pt"
    inside.write_bytes(ode_init.read_bytes())
    with pytest.raises(ValueError, match="lies in the output directory"):
        convert_wan_checkpoint(inside, directory, base_model=str(tiny_wan), overwrite=True)
    assert inside.is_file()
    weights = directory / "transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="lies in the model's directory"):
        convert_wan_to_original(directory, weights, overwrite=True)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        convert_wan_to_original(directory, tmp_path / "back.pt")


def test_a_failed_write_leaves_the_older_file(ode_init, tiny_wan, tmp_path, monkeypatch):
    from fv_distill.export import weights_file

    file = tmp_path / "back.safetensors"
    file.write_bytes(b"older")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights_file, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        convert_wan_to_original(tiny_wan, file, overwrite=True)
    assert file.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "in"]


def test_a_failed_write_leaves_the_older_directory(ode_init, tiny_wan, tmp_path, monkeypatch):
    directory = convert_wan_checkpoint(ode_init, tmp_path / "out", base_model=str(tiny_wan))

    def fail(self, path):
        path.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(WanTransformer3DModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        convert_wan_checkpoint(ode_init, directory, base_model=str(tiny_wan), overwrite=True)
    monkeypatch.undo()
    DiffusionPipeline.from_pretrained(directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--base-model is required"),
        (("--base-model", "x", "--to-original"), "--to-original takes no --base-model"),
        (("--key", "x", "--to-original"), "and no --key"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert-wan", "--input", "a", "--output", "b", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base-model", "nowhere"), "base_model='nowhere': no such directory"),
        (("--base-model", "{base}", "--dtype", "int4"), "dtype='int4' is not one of"),
        (("--base-model", "{base}"), "none.pt: no such file or directory"),
        (("--to-original",), "model='none.pt': no such directory"),
    ],
)
def test_what_a_user_can_mend_is_one_message(tiny_wan, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    words = [word.format(base=tiny_wan) for word in words]
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert-wan", "--input", "none.pt", "--output", "out.safetensors", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 2
    assert not list(tmp_path.iterdir())
