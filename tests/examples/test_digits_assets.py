"""What examples/digits ships: the teacher, the judge, the metrics, the rows, and the scripts that made them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import WanPipeline

from fv_distill.data import digits

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
MEGABYTE = 1e6


@pytest.fixture(scope="module")
def pipeline():
    loaded = WanPipeline.from_pretrained(DIGITS / "teacher")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def real(split="held_out", count=500):
    return digits.sample_clips(split, count, torch.Generator().manual_seed(3))


def run_script(name, *arguments):
    return subprocess.run(
        [sys.executable, str(DIGITS / name), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_the_teacher_is_small():
    size = sum(file.stat().st_size for file in (DIGITS / "teacher").rglob("*") if file.is_file())
    assert size < 5 * MEGABYTE


def test_the_vae_folds_space_into_channels(pipeline):
    clips = real(count=4).clips
    raw = pipeline.vae.encode(clips.repeat(1, 3, 1, 1, 1)).latent_dist.mode()
    torch.testing.assert_close(raw, digits.to_latents(clips), atol=2e-3, rtol=0)
    decoded = pipeline.vae.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(decoded, clips.repeat(1, 3, 1, 1, 1), atol=2e-3, rtol=0)


def test_the_latent_statistics_are_those_of_the_training_clips(pipeline):
    latents = digits.to_latents(real("train", 3000).clips)
    config = pipeline.vae.config
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.tensor(config.latents_mean), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.tensor(config.latents_std), atol=0.02, rtol=0)


def test_every_caption_has_its_own_embedding_within_the_text_length(pipeline):
    tokens = pipeline.tokenizer(list(digits.CAPTIONS)).input_ids
    assert max(map(len, tokens)) <= digits.TEXT_LENGTH
    assert pipeline.tokenizer.unk_token_id not in {token for row in tokens for token in row}
    embeddings, _ = pipeline.encode_prompt(
        list(digits.CAPTIONS), do_classifier_free_guidance=False, max_sequence_length=digits.TEXT_LENGTH
    )
    assert torch.pdist(embeddings.flatten(1)).min() > 1


def test_the_teacher_generates_what_the_caption_asks_for(pipeline):
    from judge import load_judge

    frames = pipeline(
        list(digits.CAPTIONS),
        height=digits.CANVAS,
        width=digits.CANVAS,
        num_frames=digits.NUM_FRAMES,
        num_inference_steps=20,
        guidance_scale=2.0,
        max_sequence_length=digits.TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    clips = torch.as_tensor(np.asarray(frames))[:, : digits.NUM_FRAMES].mean(-1)[:, None] * 2 - 1
    _, read = load_judge().classify(clips.float())
    assert (read == torch.arange(len(digits.CAPTIONS))).float().mean() >= 0.9


def test_the_judge_reads_held_out_clips():
    from judge import load_judge

    batch = real()
    _, read = load_judge().classify(batch.clips)
    assert (read == batch.captions).float().mean() >= 0.97


def test_frechet_distance_of_gaussians_is_the_closed_form():
    from metrics import frechet_distance

    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 2))
    b = a * np.array([2.0, 1.0]) + np.array([3.0, 0.0])
    # |mean|^2 + sum (deviation_a - deviation_b)^2
    assert frechet_distance(a, b) == pytest.approx(9 + 1, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_principal_components_are_the_widest_directions():
    from metrics import principal_components

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 3)) * np.array([1.0, 5.0, 0.1])
    components = principal_components(rows, 2)
    assert np.abs(components) == pytest.approx(np.array([[0, 1], [1, 0], [0, 0]]), abs=0.05)


def test_the_evaluator_tells_real_clips_from_damaged_ones():
    from metrics import Evaluator

    evaluator = Evaluator()
    batch = real()
    intact = evaluator(batch.clips, batch.captions)
    blurred = evaluator(batch.clips.lerp(batch.clips.roll(1, 0), 0.3), batch.captions)
    assert intact.prompt_accuracy >= 0.97
    assert blurred.frechet_cnn > 2 * intact.frechet_cnn
    assert blurred.frechet_pixel > intact.frechet_pixel
    wrong = evaluator(batch.clips, (batch.captions + 1) % len(digits.CAPTIONS))
    assert wrong.prompt_accuracy < 0.05


def test_the_shipped_rows_are_what_make_data_writes(tmp_path):
    result = run_script("make_data.py", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("clips/clips.parquet", "prompts/prompts.parquet"):
        shipped, fresh = pq.read_table(DIGITS / "data" / name), pq.read_table(tmp_path / name)
        for column in ("id", "caption", "text_embedding_shape"):
            assert shipped[column].to_pylist() == fresh[column].to_pylist()
    clips = pq.read_table(DIGITS / "data" / "clips" / "clips.parquet")
    assert (
        clips["vae_latent_bytes"].to_pylist()
        == pq.read_table(tmp_path / "clips/clips.parquet")["vae_latent_bytes"].to_pylist()
    )


def test_the_training_scripts_run(tmp_path):
    teacher = run_script("train_teacher.py", "--output", tmp_path / "teacher", "--steps", 2, "--clips", 64)
    assert teacher.returncode == 0, teacher.stderr
    assert WanPipeline.from_pretrained(tmp_path / "teacher").transformer.config.num_layers == 4
    judge = run_script("train_judge.py", "--output", tmp_path / "judge.safetensors", "--steps", 2)
    assert judge.returncode == 0, judge.stderr
    assert (tmp_path / "judge.safetensors").stat().st_size < MEGABYTE
