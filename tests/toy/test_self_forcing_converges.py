"""A minute of Self-Forcing on real digits: a causal student learns to go on from its own frames."""

from pathlib import Path

import pytest
import torch
from metrics import Evaluator
from wan_directory import encode_captions

from fv_distill.data.digits import CAPTIONS, from_latents
from fv_distill.export import load_role_weights
from fv_distill.models import CausalWanModel, Conditioning
from fv_distill.rollouts import autoregressive_rollout
from fv_distill.schedules import few_step_sigmas
from fv_distill.training import complete_checkpoints, run_training_from_config

REPOSITORY = Path(__file__).parents[2]
TEACHER = REPOSITORY / "examples" / "digits" / "teacher"
COUNT = 400


@pytest.mark.slow
def test_self_forcing_converges_on_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    overrides = {
        "training.output_dir": str(tmp_path),
        "training.loop.max_train_steps": 120,
        "training.tracker.trackers": [],
    }
    run_training_from_config("examples/configs/self_forcing/digits.yaml", overrides=overrides)
    model = CausalWanModel.from_pretrained(str(TEACHER), chunk_size=1, text_length=8)
    evaluate, text = Evaluator(), encode_captions(TEACHER, list(CAPTIONS))
    captions = torch.arange(COUNT) % len(CAPTIONS)

    def quality():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            latents = autoregressive_rollout(
                model,
                torch.randn(COUNT, 16, 5, 4, 4, generator=generator),
                Conditioning(text[captions], None),
                few_step_sigmas((1000, 750, 500, 250), flow_shift=model.flow_shift, warp=True),
                exit_steps=[3] * 5,
                sample_type="sde",
                fresh_noise=lambda chunk, step: torch.randn(COUNT, 16, 1, 4, 4, generator=generator),
            ).x0
        return evaluate(from_latents(latents * model.latents_std + model.latents_mean), captions)

    before = quality()
    model.transformer.load_state_dict(load_role_weights(complete_checkpoints(tmp_path)[-1], "ema"))
    after = quality()
    assert after.frechet_cnn < 0.6 * before.frechet_cnn
    assert after.frechet_pixel < 0.8 * before.frechet_pixel
    assert after.prompt_accuracy > before.prompt_accuracy
