"""Train the judge on real clips and save it. Takes less than a minute on two cores.

python examples/digits/train_judge.py --output examples/digits/judge.safetensors
"""

import argparse
from pathlib import Path
from typing import get_args

import torch
from judge import JUDGE_FILE, Judge
from safetensors.torch import save_file
from torch.nn import functional

from fv_distill.data.digits import DIRECTIONS, NUM_FRAMES, WRAP_PERIOD, Motion, sample_clips

# Clips of wrapping digits are judged in parts, and a part may begin anywhere.
FIRST_FRAMES = {"wall": range(1), "wrap": range(WRAP_PERIOD)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=JUDGE_FILE)
    parser.add_argument("--motion", choices=get_args(Motion), default="wall", help="of the clips that it judges")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, args.steps)
    for step in range(args.steps):
        first = FIRST_FRAMES[args.motion][step % len(FIRST_FRAMES[args.motion])]
        frames = range(first, first + NUM_FRAMES)
        batch = sample_clips("train", args.batch_size, generator, motion=args.motion, frames=frames)
        # Noise of random strength keeps the judge from reading digits off single pixels.
        strength = 0.15 * torch.rand(args.batch_size, 1, 1, 1, 1, generator=generator)
        noisy = batch.clips + strength * torch.randn(batch.clips.shape, generator=generator)
        _, digit, direction = judge(noisy)
        loss = functional.nll_loss(digit, batch.captions // len(DIRECTIONS))
        loss = loss + functional.cross_entropy(direction, batch.captions % len(DIRECTIONS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    judge.eval()
    for first in FIRST_FRAMES[args.motion]:
        frames = range(first, first + NUM_FRAMES)
        unseen = torch.Generator().manual_seed(args.seed + 1)
        held_out = sample_clips("held_out", 4000, unseen, motion=args.motion, frames=frames)
        _, captions = judge.classify(held_out.clips)
        accuracy = (captions == held_out.captions).float().mean().item()
        print(f"held-out accuracy on digit and direction, from frame {first}: {accuracy:.4f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), args.output)


if __name__ == "__main__":
    main()
