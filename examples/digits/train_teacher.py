"""Train the digits teacher from scratch with plain flow matching and save it as a diffusers directory.

Muon on the blocks' matrices and AdamW on the rest; about ten minutes on two cores.

    python examples/digits/train_teacher.py --output examples/digits/teacher
"""

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from wan_directory import FLOW_SHIFT, build_pipeline, build_transformer, encode_captions

from fv_distill.data.digits import CAPTIONS, Motion, sample_clips, to_latents
from fv_distill.losses.flow_matching import flow_matching_loss
from fv_distill.schedules import flow
from fv_distill.schedules.shift import shift_sigma

CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("teacher"))
    parser.add_argument("--motion", choices=get_args(Motion), default="wall", help="of the clips that it learns")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--clips", type=int, default=30000, help="size of the training set that batches are drawn from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = sample_clips("train", args.clips, torch.Generator().manual_seed(args.seed), motion=args.motion)
    raw = to_latents(data.clips)
    mean, std = raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4))
    latents = (raw - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    transformer = build_transformer(args.seed)
    shutil.rmtree(args.output, ignore_errors=True)
    build_pipeline(transformer, latents_mean=mean, latents_std=std).save_pretrained(args.output)
    text = encode_captions(args.output, [*CAPTIONS, ""])

    averaged = train(transformer, latents, data.captions, text, args)
    averaged.save_pretrained(args.output / "transformer")
    print(f"saved {args.output}")


def train(
    transformer: nn.Module, latents: Tensor, captions: Tensor, text: Tensor, args: argparse.Namespace
) -> nn.Module:
    """The loop; returns the averaged network. The last row of `text` is the empty prompt."""
    average = torch.optim.swa_utils.AveragedModel(
        transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizers = build_optimizers(transformer)
    generator = torch.Generator().manual_seed(args.seed + 1)
    start, running = time.monotonic(), 0.0
    for step in range(args.steps):
        scale = learning_rate_scale(step, args.steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        chosen = torch.randint(len(latents), (args.batch_size,), generator=generator)
        x0, caption = latents[chosen], captions[chosen].clone()
        caption[torch.rand(args.batch_size, generator=generator) < CAPTION_DROPOUT] = len(CAPTIONS)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = shift_sigma(torch.rand(args.batch_size, generator=generator), FLOW_SHIFT)
        x_t = flow.add_noise(x0, noise, sigma)
        (velocity,) = transformer(x_t, 1000 * sigma, text[caption], return_dict=False)
        loss = flow_matching_loss(velocity, flow.velocity_target(x0, noise))
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(transformer)
        running += loss.item()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {running / 250:.4f}, {time.monotonic() - start:.0f} s", flush=True)
            running = 0.0
    return average.module


def build_optimizers(transformer: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside blocks, AdamW for the rest."""
    matrices = [p for name, p in transformer.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    rest = [p for name, p in transformer.named_parameters() if not (name.startswith("blocks") and p.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def learning_rate_scale(step: int, steps: int) -> float:
    """100 steps of warm-up, a plateau for 15% of the run, then half a cosine down to 2%."""
    progress = step / steps
    decay = 1.0 if progress < 0.15 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.15) / 0.85))
    return min(1.0, (step + 1) / 100) * decay


if __name__ == "__main__":
    main()
