"""The teacher, the judge and the rows that the repository ships are what their scripts say they are."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from judge import load_judge
from metrics import Evaluator, frechet_distance

from fv_distill.data import ParquetDataset
from fv_distill.data.digits import CAPTIONS, WRAP_PERIOD, sample_clips, to_latents
from fv_distill.models import WanModel

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SCENARIO = DIGITS.parent / "scenarios" / "causal_wan"


@pytest.fixture(scope="module")
def held_out():
    return sample_clips("held_out", 500, torch.Generator().manual_seed(0))


def test_judge_reads_real_clips(held_out):
    _, captions = load_judge().classify(held_out.clips)
    assert (captions == held_out.captions).float().mean() > 0.97


@pytest.mark.parametrize("first", range(WRAP_PERIOD))
def test_judge_of_the_causal_scenario_reads_clips_from_any_frame_on(first):
    generator = torch.Generator().manual_seed(0)
    clips = sample_clips("held_out", 500, generator, motion="wrap", frames=range(first, first + 5))
    _, captions = load_judge(SCENARIO / "judge.safetensors").classify(clips.clips)
    assert (captions == clips.captions).float().mean() > 0.97


def test_vae_folds_space_exactly(held_out):
    vae = AutoencoderKLWan.from_pretrained(DIGITS / "teacher", subfolder="vae")
    rgb = held_out.clips[:8].repeat(1, 3, 1, 1, 1)
    with torch.no_grad():
        latents = vae.encode(rgb).latent_dist.mode()
        decoded = vae.decode(latents).sample
    torch.testing.assert_close(latents, to_latents(held_out.clips[:8]), atol=1e-3, rtol=0)
    torch.testing.assert_close(decoded, rgb, atol=1e-3, rtol=0)


def test_rows_are_normalised_clips_with_the_teachers_text():
    rows = ParquetDataset(str(DIGITS / "data" / "clips"))
    model = WanModel.from_pretrained(str(DIGITS / "teacher"), text_length=8)
    latents = torch.stack([rows[index]["vae_latent"] for index in range(500)])
    normalised = model.normalize_latents(latents)
    assert abs(normalised.mean()) < 0.1 and abs(normalised.std() - 1) < 0.1
    text = model.encode_prompts([rows[0]["caption"]])
    stored = rows[0]["text_embedding"]
    torch.testing.assert_close(stored, text.text[0, text.text_mask[0]], atol=2e-3, rtol=0)


def test_there_is_a_row_for_every_prompt():
    rows = ParquetDataset(str(DIGITS / "data" / "prompts"))
    assert [rows[index]["caption"] for index in range(len(rows))] == list(CAPTIONS)


def test_frechet_distance_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 2, generator=generator) * torch.tensor([1.0, 2.0])
    b = torch.randn(20000, 2, generator=generator) * torch.tensor([3.0, 2.0]) + torch.tensor([1.0, 0.0])
    # |mean|^2 + sum (sd_a - sd_b)^2 for diagonal Gaussians.
    assert frechet_distance(a.numpy(), b.numpy()) == pytest.approx(1 + 4, rel=0.05)


def test_metrics_tell_real_from_broken_clips(held_out):
    evaluate = Evaluator()
    real = evaluate(held_out.clips, held_out.captions)
    blurred = evaluate((held_out.clips + held_out.clips.flip(0)) / 2, held_out.captions)
    mislabelled = evaluate(held_out.clips, held_out.captions.flip(0))
    assert real.frechet_cnn < 0.3 * blurred.frechet_cnn and real.frechet_pixel < 0.5 * blurred.frechet_pixel
    assert real.prompt_accuracy > 0.97 > 0.5 > mislabelled.prompt_accuracy
