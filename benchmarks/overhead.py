"""What callbacks, trackers and the progress bar cost a step: a DMD2 run with all of them against one without.

Both go through the trainer with copies of the same networks and the same data, and take turns step by step in one
process: a callback of the first runs a step of the second after each of its own. The first has the average, clipping,
`nan_guard` and `throughput` at their defaults, a profiler whose steps never come, tensorboard at every step, and a
progress bar on a terminal; the second has none of these, and both write `metrics.jsonl`. Validation is work of its own
kind and left out. The ratio is the median over pairs of steps of with / without, and the target is at most 1.02; the
same of CPU time, which other programs disturb less, is reported beside it. The script prints one JSON line.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py
"""

import argparse
import json
import os
import pty
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dmd2_roles import make_models

from fv_distill.callbacks import Callback
from fv_distill.config import load_run_config
from fv_distill.methods import DMD2Method, DMD2Options
from fv_distill.training import Trainer, build_accelerator, build_callbacks, build_dataset

ROOT = Path(__file__).resolve().parents[1]
CALLBACKS = {
    "ema": {"decay": 0.95},
    "grad_clip": {"max_grad_norm": 1.0},
    "nan_guard": {},
    "profiler": {"start_step": 1_000_000},
    "throughput": {},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--latent-frames", type=int, default=5)
    parser.add_argument("--latent-size", type=int, default=16, help="height and width; a token is 2 x 2")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_trainer(args: argparse.Namespace, folder: str, *, with_all: bool) -> Trainer:
    overrides: dict[str, Any] = {
        "training.output_dir": f"{folder}/{'with' if with_all else 'without'}",
        "training.data.data_path": str(ROOT / "examples/digits/data/prompts"),
        "training.data.cache_dir": f"{folder}/cache",
        "training.data.latent_shape": [16, args.latent_frames, args.latent_size, args.latent_size],
        "training.data.train_batch_size": args.batch_size,
        "training.optimizer": {"learning_rate": 1e-5},
        "training.loop.max_train_steps": args.warm_up + args.steps,
        "training.checkpoint.every_steps": 0,
        "training.tracker": {"trackers": ["tensorboard"] if with_all else [], "log_every_steps": 1},
    }
    config = load_run_config(ROOT / "examples/configs/dmd2/digits.yaml", overrides)
    kind = type(config.callbacks["ema"])
    config.callbacks = {name: kind(**options) for name, options in CALLBACKS.items()} if with_all else {}
    accelerator = build_accelerator(config)
    method = DMD2Method(make_models(args.width, args.layers), DMD2Options(**config.method.options))
    return Trainer(accelerator, method, build_dataset(config), config, build_callbacks(config))


Seconds = tuple[float, float]
"""Of the clock, and of this process's CPU time."""


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def difference(end: Seconds, start: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]


class TakeTurns(Callback):
    """Times its own trainer's steps, everything in their loop, and runs and times a step of the other's after each."""

    def __init__(self, other: Trainer) -> None:
        self.other = other
        self.batches = other._batches()
        self.with_seconds: list[Seconds] = []
        self.without_seconds: list[Seconds] = []
        self.began = now()
        other.log.start(0, other.config.training.loop.max_train_steps)

    def on_train_start(self, trainer: Trainer) -> None:
        self.began = now()

    def on_training_step_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        start = now()
        self.with_seconds.append(difference(start, self.began))
        if self.other.step < self.other.config.training.loop.max_train_steps - 1:
            self.other._train_step(next(self.batches))
        self.began = now()
        self.without_seconds.append(difference(self.began, start))


@contextmanager
def a_terminal() -> Iterator[None]:
    """Let standard output be a terminal that someone reads, for the progress bar."""
    ours, theirs = pty.openpty()
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(theirs, 1)
    os.close(theirs)
    threading.Thread(target=_read_all, args=(ours,), daemon=True).start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)


def _read_all(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        # Linux's way to say that nobody writes to it any more.
        return


def report(args: argparse.Namespace, turns: TakeTurns) -> dict[str, Any]:
    # The last step is the first run's alone: both would save a checkpoint there.
    measured = slice(args.warm_up, -1)
    (ours, our_cpu), (theirs, their_cpu) = (
        zip(*side[measured], strict=True) for side in (turns.with_seconds, turns.without_seconds)
    )
    student = turns.other.models["student"].transformer
    return {
        "benchmark": "overhead",
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 4),
        "target_ratio": 1.02,
        "ratio_of_cpu_time": round(statistics.median(a / b for a, b in zip(our_cpu, their_cpu, strict=True)), 4),
        "ratio_of_cpu_sums": round(sum(our_cpu) / sum(their_cpu), 4),
        "overhead_ms": round(1e3 * statistics.median(a - b for a, b in zip(ours, theirs, strict=True)), 2),
        "with_ms": round(1e3 * statistics.median(ours), 2),
        "without_ms": round(1e3 * statistics.median(theirs), 2),
        "steps": len(ours),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "tokens": args.latent_frames * (args.latent_size // 2) ** 2,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        # Before there is a terminal, which would give this one a progress bar too.
        turns = TakeTurns(make_trainer(args, folder, with_all=False))
        with a_terminal():
            trainer = make_trainer(args, folder, with_all=True)
            trainer.callbacks.add("take_turns", turns)
            trainer.train()
            trainer.accelerator.end_training()
        result = report(args, turns)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
