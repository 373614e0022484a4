"""The velocity at given frames: it leads to them from every noise level, with and without guidance."""

from dataclasses import replace

import pytest
import torch
from tiny_cosmos import make_tiny_cosmos_directory
from tiny_kandinsky5 import make_tiny_kandinsky5_i2v_directory
from tiny_longcat import make_tiny_longcat_directory
from tiny_ltx2 import make_tiny_ltx2_directory
from tiny_models import TEXT_LENGTH
from tiny_wan import make_ti2v_directory

from fv_distill import models
from fv_distill.models.clean_frames import COLUMN, lead_to, put_in_place
from fv_distill.schedules import flow


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 4, 5, 6, generator=generator) for _ in range(3))


@pytest.mark.parametrize("sigma", [1.0, 0.3, 1e-4])
def test_it_is_the_paths_own_and_leads_to_what_was_given(clips, sigma):
    x0, eps, velocity = clips
    levels = torch.full((2,), sigma)
    x_t = flow.add_noise(x0, eps, levels)
    found = lead_to(x0[:, :, :2], x_t, levels, velocity)
    torch.testing.assert_close(found[:, :, :2], (eps - x0)[:, :, :2], atol=1e-2 if sigma < 1e-3 else 1e-5, rtol=0)
    torch.testing.assert_close(flow.velocity_to_x0(x_t, found, levels)[:, :, :2], x0[:, :, :2], atol=1e-6, rtol=0)
    assert torch.equal(found[:, :, 2:], velocity[:, :, 2:])


def test_where_there_is_no_noise_there_is_no_way_left(clips):
    x0, _, velocity = clips
    assert lead_to(x0[:, :, :1], x0 + 1, torch.zeros(2), velocity)[:, :, :1].abs().max() == 0


def test_given_frames_have_a_level_of_their_own(clips):
    x0, eps, _ = clips
    frames, levels = put_in_place(eps, torch.tensor([0.5, 0.9]), x0[:, :, :2], level=0.1)
    torch.testing.assert_close(levels, torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.9, 0.9]]))
    assert torch.equal(frames, torch.cat([x0[:, :, :2], eps[:, :, 2:]], dim=2))


FAMILIES = {
    "CosmosModel": (make_tiny_cosmos_directory, {"condition_frames": 1}),
    "Kandinsky5Model": (make_tiny_kandinsky5_i2v_directory, {}),
    "LongCatVideoModel": (make_tiny_longcat_directory, {"condition_frames": 1}),
    "LTX2VideoModel": (make_tiny_ltx2_directory, {"condition_frames": 1}),
    "WanImageToVideoModel": (make_ti2v_directory, {}),
}


@torch.no_grad()
@pytest.mark.parametrize("image", ["keep", "zero", "drop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_leaves_given_frames_as_they_are(family, image, tmp_path):
    """Else DMD's direction there isn't zero, and counts in the length that all frames are divided by."""
    make, options = FAMILIES[family]
    options = {"text_length": TEXT_LENGTH, "flow_shift": 5.0, **options}
    model = getattr(models, family).from_pretrained(str(make(tmp_path / "model")), **options)
    generator = torch.Generator().manual_seed(0)
    x_t, given = (torch.randn(1, 4, frames, 4, 4, generator=generator) for frames in (5, 1))
    text = model.prompt_conditioning("a digit")
    positive = replace(text, extras={**text.extras, COLUMN: given})
    negative = models.unconditional(positive, models.UncondPolicy(image=image), model.negative_conditioning())
    guided = model.predict_x0_guided(x_t, torch.tensor([0.5]), positive, negative, 5.0)
    torch.testing.assert_close(guided[:, :, :1], given, atol=1e-5, rtol=0)
    assert (guided - model.predict_x0(x_t, torch.tensor([0.5]), positive))[:, :, 1:].abs().max() > 1e-4
