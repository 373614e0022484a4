"""The denoising of MatrixGame2Pipeline, the adapter, and the published sampling written out, against each other."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from euler import euler
from tiny_matrixgame2 import CHANNELS, LATENT_SHAPE, conditions, make_directory

from fv_distill.export import few_step_scheduler
from fv_distill.models import Conditioning, MatrixGame2Model
from fv_distill.models.pipelines import MatrixGame2Pipeline
from fv_distill.schedules.few_step import few_step_sigmas


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("tiny") / "matrixgame2")


@pytest.fixture(scope="module")
def pipeline(directory):
    pipeline = MatrixGame2Pipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(directory):
    return MatrixGame2Model.from_pretrained(str(directory))


IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
ACTIONS = {name: value for name, value in conditions(1).items() if name.endswith("_cond")}
NOISE = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))


def run_pipeline(pipeline, *, steps, guidance_scale=1.0, output_type="latent"):
    size = {"height": 32, "width": 32, "num_frames": 9}
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": output_type}
    return pipeline(IMAGE, **ACTIONS, **size, **options, latents=NOISE).frames


def given(model, **changes):
    seen = model.encoders().encode_images(IMAGE[:, :, None].expand(-1, -1, 9, -1, -1))
    return Conditioning(None, None, {**seen, **ACTIONS, **changes})


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_denoising_equals_the_adapters(pipeline, model, steps, guidance_scale):
    expected = run_pipeline(pipeline, steps=steps, guidance_scale=guidance_scale)
    # The published shift of evenly spaced levels: 5 s / (1 + 4 s).
    even = [1 - step / steps for step in range(steps)]
    sigmas = [5 * sigma / (1 + 4 * sigma) for sigma in even] + [0.0]
    still = given(model, **{name: torch.zeros_like(value) for name, value in ACTIONS.items()})
    x_t = euler(model, NOISE, torch.tensor(sigmas), given(model), still, scale=guidance_scale)
    torch.testing.assert_close(expected, x_t, atol=1e-5, rtol=0)
    assert (expected - NOISE).abs().max() > 1e-2


@torch.no_grad()
def test_a_few_step_student_visits_the_published_levels(pipeline, model):
    """Three steps as the published inference takes them, without its fresh noise: x0 = x_t - sigma * output."""
    sigmas = few_step_sigmas((1000, 666, 333), flow_shift=5.0, warp=True)
    table = [5 * (1 - i / 1000) / (1 + 4 * (1 - i / 1000)) for i in range(1000)]
    assert sigmas == pytest.approx([table[1000 - step] for step in (1000, 666, 333)])
    scheduler = pipeline.scheduler
    try:
        pipeline.scheduler = few_step_scheduler(sigmas, sample_type="ode")
        expected = run_pipeline(pipeline, steps=3)
    finally:
        pipeline.scheduler = scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    x_t = NOISE
    for sigma, following in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        seen = given(model).extras
        mask = torch.zeros(1, 4, *LATENT_SHAPE[1:])
        mask[:, :, 0] = 1
        output = model.transformer(
            torch.cat([x_t, mask, seen["first_frame_latent"]], dim=1),
            torch.tensor([1000 * sigma]),
            seen["clip_feature"],
            **ACTIONS,
        ).sample
        x0 = x_t - sigma * output
        x_t = (1 - following) * x0 + following * (x0 + output)
    torch.testing.assert_close(expected, x_t, atol=1e-5, rtol=0)


def test_videos_are_what_the_adapter_decodes(pipeline, model):
    video = run_pipeline(pipeline, steps=1, output_type="pt")
    latents = run_pipeline(pipeline, steps=1)
    assert latents.shape[1] == CHANNELS
    torch.testing.assert_close(video.transpose(1, 2), model.decode_latents(latents), atol=1e-5, rtol=0)


def test_sizes_that_do_not_fold(pipeline):
    with pytest.raises(ValueError, match="height=40 must be a multiple of 16"):
        pipeline(IMAGE, height=40, width=32, num_frames=9)
    with pytest.raises(ValueError, match="num_frames=8 must be a multiple of 4, plus 1"):
        pipeline(IMAGE, height=32, width=32, num_frames=8)


def test_the_pipeline_saves_and_loads(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = MatrixGame2Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run_pipeline(again, steps=1), run_pipeline(pipeline, steps=1), atol=0, rtol=0)
