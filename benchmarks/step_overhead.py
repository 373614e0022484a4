"""What the trainer adds to a DMD2 step: the step through it, against the same step written by hand.

Both sides train copies of the same three networks at the same exit steps: per step the rollout, the critic's update
and, in every k-th step, the student's, each with clipping, AdamW and an average of the student's weights. The
hand-written side has its batch in memory and draws its noise in one call; the trainer also reads and collates rows,
derives the noise per sample, logs metrics to a file and to tensorboard, and runs callbacks. They take turns step by
step in one process: a callback runs the hand-written step after each of the trainer's. The reported ratio is the
median over steps of trainer / by hand, and the target is at most 1.05. The script prints one JSON line.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from dmd2_roles import TEXT_DIM, TEXT_LENGTH, make_models

from fv_distill.callbacks import Callback
from fv_distill.config import load_run_config
from fv_distill.losses import dmd_loss, flow_matching_loss
from fv_distill.methods import DMD2Method, DMD2Options
from fv_distill.models import UncondPolicy, WanModel, unconditional
from fv_distill.models.conditioning import Conditioning
from fv_distill.rng import SampleRng
from fv_distill.rollouts import few_step_rollout
from fv_distill.schedules import add_noise, score_sigma, velocity_target
from fv_distill.training import Trainer, build_accelerator, build_callbacks, build_dataset

ROOT = Path(__file__).resolve().parents[1]
EMA_DECAY = 0.95
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--latent-frames", type=int, default=5)
    parser.add_argument("--latent-size", type=int, default=16, help="height and width; a token is 2 x 2")
    parser.add_argument("--no-ema", action="store_true", help="without the average, on both sides")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class HandWrittenLoop:
    """DMD2 without a trainer, a method, callbacks or a loader."""

    def __init__(self, models: dict[str, WanModel], options: DMD2Options, args: argparse.Namespace) -> None:
        self.student, self.teacher, self.critic = models["student"], models["teacher"], models["critic"]
        self.sigmas = (1.0, 0.9, 0.75, 0.5)
        self.interval = options.generator_update_interval
        self.scale = options.real_score_guidance_scale
        self.ema = None if args.no_ema else copy.deepcopy(self.student.transformer).requires_grad_(False)
        self.optimizers = {
            model: torch.optim.AdamW(model.transformer.parameters(), lr=LEARNING_RATE)
            for model in (self.student, self.critic)
        }
        batch, frames, size = args.batch_size, args.latent_frames, args.latent_size
        self.shape = (batch, 16, frames, size, size)
        text = torch.randn(batch, TEXT_LENGTH, TEXT_DIM)
        self.conditioning = Conditioning(text, torch.ones(batch, TEXT_LENGTH, dtype=torch.bool))
        self.negative = unconditional(self.conditioning, UncondPolicy(), self.student.negative_conditioning())

    def step(self, index: int) -> None:
        is_student_step = index % self.interval == 0
        role = "student" if is_student_step else "critic"
        # The trainer's exit step, so that both sides make the same network calls.
        exit_step = SampleRng(0, index, [0]).shared_integer(f"{role}/exit", len(self.sigmas))
        generated = few_step_rollout(
            self.student,
            torch.randn(self.shape),
            self.conditioning,
            self.sigmas,
            exit_step=exit_step,
            sample_type="sde",
            fresh_noise=lambda _: torch.randn(self.shape),
            grad=is_student_step,
        )
        if is_student_step:
            sigma = score_sigma(torch.rand(self.shape[0]), shift=3.0)
            x_t = add_noise(generated.detach(), torch.randn(self.shape), sigma)
            with torch.no_grad():
                real = self.teacher.predict_x0_guided(x_t, sigma, self.conditioning, self.negative, self.scale)
                fake = self.critic.predict_x0(x_t, sigma, self.conditioning)
            self.update(self.student, dmd_loss(generated, real_x0=real, fake_x0=fake))
            if self.ema is not None:
                self.tick(self.ema)
            generated = generated.detach()
        noise, sigma = torch.randn(self.shape), score_sigma(torch.rand(self.shape[0]), shift=3.0)
        velocity = self.critic.predict_velocity(add_noise(generated, noise, sigma), sigma, self.conditioning)
        self.update(self.critic, flow_matching_loss(velocity, velocity_target(generated, noise)))

    def update(self, model: WanModel, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.transformer.parameters(), MAX_GRAD_NORM)
        self.optimizers[model].step()
        self.optimizers[model].zero_grad(set_to_none=True)

    @torch.no_grad()
    def tick(self, ema: torch.nn.Module) -> None:
        for average, current in zip(ema.parameters(), self.student.transformer.parameters(), strict=True):
            average.lerp_(current, 1 - EMA_DECAY)


class TakeTurns(Callback):
    """Times the trainer's steps from the end of the last turn, and runs the hand-written step after each.

    What the trainer does behind this hook, logging, falls into its next step's time; so every part of its loop counts.
    """

    def __init__(self, loop: HandWrittenLoop) -> None:
        self.loop = loop
        self.trainer_seconds: list[float] = []
        self.hand_seconds: list[float] = []
        self.began = time.perf_counter()

    def on_training_step_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self.trainer_seconds.append(time.perf_counter() - self.began)
        start = time.perf_counter()
        self.loop.step(trainer.step)
        self.hand_seconds.append(time.perf_counter() - start)
        self.began = time.perf_counter()


def make_trainer(args: argparse.Namespace, options: DMD2Options, output_dir: str) -> Trainer:
    overrides: dict[str, Any] = {
        "training.output_dir": output_dir,
        "training.data.data_path": str(ROOT / "examples/digits/data/prompts"),
        "training.data.cache_dir": f"{output_dir}/cache",
        "training.data.latent_shape": [16, args.latent_frames, args.latent_size, args.latent_size],
        "training.data.train_batch_size": args.batch_size,
        "training.optimizer": {"learning_rate": LEARNING_RATE},
        "training.loop.max_train_steps": args.warm_up + args.steps,
        "training.checkpoint.every_steps": 0,
        "callbacks.ema.decay": EMA_DECAY,
        "callbacks.grad_clip.max_grad_norm": MAX_GRAD_NORM,
    }
    config = load_run_config(ROOT / "examples/configs/dmd2/digits.yaml", overrides)
    if args.no_ema:
        del config.callbacks["ema"]
    accelerator = build_accelerator(config)
    method = DMD2Method(make_models(args.width, args.layers), options)
    return Trainer(accelerator, method, build_dataset(config), config, build_callbacks(config))


def report(args: argparse.Namespace, turns: TakeTurns, models: dict[str, WanModel], interval: int) -> dict[str, Any]:
    trainer, hand = turns.trainer_seconds[args.warm_up :], turns.hand_seconds[args.warm_up :]
    ratios = [ours / theirs for ours, theirs in zip(trainer, hand, strict=True)]
    with_student = [(args.warm_up + index + 1) % interval == 0 for index in range(len(ratios))]
    kinds = {
        f"ratio_{name}": round(statistics.median(chosen), 4)
        for name, wanted in (("critic_steps", False), ("student_steps", True))
        if (chosen := [ratio for ratio, student in zip(ratios, with_student, strict=True) if student is wanted])
    }
    return {
        "benchmark": "step_overhead",
        "ratio": round(statistics.median(ratios), 4),
        "target_ratio": 1.05,
        **kinds,
        "ratio_of_sums": round(sum(trainer) / sum(hand), 4),
        "overhead_ms": round(1e3 * statistics.median(a - b for a, b in zip(trainer, hand, strict=True)), 2),
        "trainer_step_ms": round(1e3 * statistics.median(trainer), 2),
        "hand_step_ms": round(1e3 * statistics.median(hand), 2),
        "steps": args.steps,
        "parameters": sum(parameter.numel() for parameter in models["student"].transformer.parameters()),
        "tokens": args.latent_frames * (args.latent_size // 2) ** 2,
        "batch_size": args.batch_size,
        "ema": not args.no_ema,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    options = DMD2Options()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(args, options, output_dir)
        models = make_models(args.width, args.layers)
        turns = TakeTurns(HandWrittenLoop(models, options, args))
        trainer.callbacks.add("take_turns", turns)
        turns.began = time.perf_counter()
        trainer.train()
        trainer.accelerator.end_training()
    print(json.dumps(report(args, turns, models, options.generator_update_interval)))


if __name__ == "__main__":
    main()
