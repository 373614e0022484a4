import json
import re
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file
from tiny_models import LATENT_CHANNELS, TEXT_LENGTH, make_tiny_transformer

from fv_distill.export import StudentInfo, export_diffusers_directory
from fv_distill.models import WanModel
from fv_distill.rollouts import few_step_sample
from fv_distill.schedules import few_step_sigmas

SIGMAS = few_step_sigmas((1000, 750, 500, 250), flow_shift=3.0, warp=True)
PROMPT = "a handwritten three moving left"
CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": TEXT_LENGTH}


@pytest.fixture(scope="module", params=["sde", "ode"])
def exported(request, tiny_wan, tmp_path_factory):
    info = StudentInfo(str(tiny_wan), "fv_distill.methods.DMD2Method", SIGMAS, request.param, call=CALL)
    directory = tmp_path_factory.mktemp("export") / f"student-{request.param}"
    return export_diffusers_directory(directory, make_tiny_transformer(seed=5).state_dict(), info), request.param


def test_the_pipelines_latents_equal_the_samplers(exported):
    directory, sample_type = exported
    pipeline = DiffusionPipeline.from_pretrained(directory)
    noise = torch.randn(2, LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = pipeline(
        [PROMPT, PROMPT],
        latents=noise,
        num_inference_steps=len(SIGMAS),
        guidance_scale=1.0,
        output_type="latent",
        **CALL,
    ).frames
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*SIGMAS, 0.0], abs=1e-6)

    student = WanModel.from_pretrained(str(directory), flow_shift=3.0, text_length=TEXT_LENGTH)
    torch.manual_seed(1)
    actual = few_step_sample(
        student,
        noise,
        student.encode_prompts([PROMPT, PROMPT]),
        SIGMAS,
        sample_type=sample_type,
        fresh_noise=lambda _: torch.randn(noise.shape),
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_export_loads_without_this_library(exported):
    """The card's own snippet, in an interpreter that can't import fv_distill."""
    directory, _ = exported
    snippet = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL).group(1)
    blocked = "import sys\nsys.modules['fv_distill'] = None\n" + snippet + "\nprint('frames', len(result.frames[0]))"
    done = subprocess.run(
        [sys.executable, "-c", blocked], cwd=directory.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "frames 9" in done.stdout
    assert (directory.parent / "sample.gif").stat().st_size > 0


def test_info_and_card_say_how_to_sample(exported):
    directory, sample_type = exported
    info = json.loads((directory / "fv_distill.json").read_text())
    assert info["sigmas"] == pytest.approx(list(SIGMAS)) and info["sample_type"] == sample_type
    assert info["call"] == {**CALL, "num_inference_steps": 4, "guidance_scale": 1.0}
    card = (directory / "README.md").read_text()
    assert "num_inference_steps=4" in card and "guidance_scale=1.0" in card
    assert ("global" in card) == (sample_type == "sde")


def test_a_fine_tuned_model_keeps_the_base_scheduler(tiny_wan, tmp_path):
    info = StudentInfo(str(tiny_wan), "fv_distill.methods.FineTuneMethod", None)
    directory = export_diffusers_directory(tmp_path / "tuned", make_tiny_transformer(5).state_dict(), info)
    base, own = (json.loads((path / "scheduler/scheduler_config.json").read_text()) for path in (tiny_wan, directory))
    assert base == own


def test_dtype_of_the_written_weights(tiny_wan, tmp_path):
    info = StudentInfo(str(tiny_wan), "m", SIGMAS)
    directory = export_diffusers_directory(
        tmp_path / "half", make_tiny_transformer(5).state_dict(), info, dtype=torch.bfloat16
    )
    weights = load_file(directory / "transformer/diffusion_pytorch_model.safetensors")
    # What stock diffusers keeps in float32 when it loads in half precision is not rounded on the way.
    kept = {key for key, value in weights.items() if value.dtype == torch.float32}
    assert "scale_shift_table" in kept and "blocks.0.norm2.weight" in kept
    assert {value.dtype for key, value in weights.items() if key not in kept} == {torch.bfloat16}
    loaded = WanTransformer3DModel.from_pretrained(directory, subfolder="transformer", dtype=torch.bfloat16)
    assert all(torch.equal(loaded.state_dict()[key], weights[key]) for key in weights)


def test_existing_directories_are_kept(tiny_wan, tmp_path):
    info, weights = StudentInfo(str(tiny_wan), "m", SIGMAS), make_tiny_transformer(5).state_dict()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not empty"):
        export_diffusers_directory(tmp_path / "out", weights, info)
    with pytest.raises(FileExistsError, match="something else than an export"):
        export_diffusers_directory(tmp_path / "out", weights, info, overwrite=True)
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep me"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_older_export_is_replaced_only_with_overwrite(tiny_wan, tmp_path):
    info, weights = StudentInfo(str(tiny_wan), "m", SIGMAS), make_tiny_transformer(5).state_dict()
    directory = export_diffusers_directory(tmp_path / "out", make_tiny_transformer(6).state_dict(), info)
    (directory / "left_over.txt").write_text("of the older export")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_diffusers_directory(directory, weights, info)
    export_diffusers_directory(directory, weights, info, overwrite=True)
    written = load_file(directory / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[key], value) for key, value in weights.items())
    assert not (directory / "left_over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", [".", "student", ".."])
def test_output_and_base_may_not_lie_in_each_other(tiny_wan, place):
    info, weights = StudentInfo(str(tiny_wan), "m", SIGMAS), make_tiny_transformer(5).state_dict()
    with pytest.raises(ValueError, match="lie in each other"):
        export_diffusers_directory(tiny_wan / place, weights, info, overwrite=True)
    assert (tiny_wan / "model_index.json").is_file() and not (tiny_wan / "student").exists()


def test_a_large_transformer_is_sharded_and_still_loads(tiny_wan, tmp_path, monkeypatch):
    save = WanTransformer3DModel.save_pretrained
    monkeypatch.setattr(WanTransformer3DModel, "save_pretrained", partialmethod(save, max_shard_size="40KB"))
    weights = make_tiny_transformer(5).state_dict()
    directory = export_diffusers_directory(tmp_path / "out", weights, StudentInfo(str(tiny_wan), "m", SIGMAS))
    assert (directory / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = DiffusionPipeline.from_pretrained(directory).transformer.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())


def test_weights_that_do_not_fit_leave_nothing_behind(tiny_wan, tmp_path):
    weights = make_tiny_transformer(5).state_dict()
    weights["surplus"] = weights.pop("proj_out.bias")
    with pytest.raises(ValueError, match=r"missing proj_out\.bias; unexpected surplus"):
        export_diffusers_directory(tmp_path / "out", weights, StudentInfo(str(tiny_wan), "m", SIGMAS))
    assert not list(tmp_path.iterdir())


def test_a_base_with_another_scheduler_gets_the_few_step_one(tiny_wan, tmp_path):
    """Wan's published directories name UniPC in their model_index.json."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_wan)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline.save_pretrained(tmp_path / "base")
    info = StudentInfo(str(tmp_path / "base"), "m", SIGMAS)
    directory = export_diffusers_directory(tmp_path / "out", make_tiny_transformer(5).state_dict(), info)
    scheduler = DiffusionPipeline.from_pretrained(directory).scheduler
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([*SIGMAS, 0.0], abs=1e-6)
