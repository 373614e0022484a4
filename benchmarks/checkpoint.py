"""How fast checkpoints are saved and loaded, against writing and reading files of the same bytes.

Makes a DMD2 run of random networks (student, critic, an average, two AdamW states) on one process, and takes turns:
the trainer's save, and the same files written from memory; its load into the run's own tensors, and the same files
read into memory. Both sides put what they write on the disk (fsync), and both read files that are dropped from the page
cache first. The reported ratio is the median of save / raw in MB/s, with a target of at least 0.8.

It also reports what a save takes from the training, with `async_save` and without: the seconds until the checkpoint is
complete, less those of the steps made meanwhile at their undisturbed speed. On a CPU the writing competes with the
training for the processor. The script prints one JSON line.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dmd2_roles import TEXT_DIM, TEXT_LENGTH, make_models

from fv_distill.config import load_run_config
from fv_distill.export import read_checkpoint_metadata
from fv_distill.methods import DMD2Method, DMD2Options
from fv_distill.models.conditioning import Conditioning
from fv_distill.training import Trainer, build_accelerator, build_callbacks, build_dataset

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--latent-size", type=int, default=8, help="height and width; a token is 2 x 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary checkpoints are made")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_trainer(args: argparse.Namespace, output_dir: str) -> Trainer:
    overrides: dict[str, Any] = {
        "training.output_dir": output_dir,
        "training.data.data_path": str(ROOT / "examples/digits/data/prompts"),
        "training.data.cache_dir": f"{output_dir}/cache",
        "training.data.latent_shape": [16, 1, args.latent_size, args.latent_size],
        "training.data.train_batch_size": 1,
        "training.optimizer": {"learning_rate": 1e-5},
        "training.loop.max_train_steps": 2,
        "training.checkpoint": {"every_steps": 0, "keep_last": 1},
        "training.tracker.trackers": [],
        "method.generator_update_interval": 2,
        "callbacks.ema.decay": 0.95,
    }
    config = load_run_config(ROOT / "examples/configs/dmd2/digits.yaml", overrides)
    models = make_models(args.width, args.layers)
    method = DMD2Method(models, DMD2Options(generator_update_interval=2))
    return Trainer(build_accelerator(config), method, build_dataset(config), config, build_callbacks(config))


def write_raw(files: dict[str, memoryview], folder: Path) -> None:
    folder.mkdir()
    for name, data in files.items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def read_raw(folder: Path) -> None:
    """Each file into memory of its own, all of which is kept until the end, as what is loaded is."""
    kept = []
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(path.stat().st_size)
            view = memoryview(buffer)
            while view and (count := file.readinto(view)):
                view = view[count:]
            kept.append(buffer)


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_speeds(trainer: Trainer, args: argparse.Namespace, scratch: Path) -> tuple[dict[str, list[float]], int]:
    """MB/s of each side, in turns."""
    path = trainer.checkpoints.save()
    metadata = read_checkpoint_metadata(path)
    files = {file.name: memoryview(file.read_bytes()) for file in path.iterdir()}
    num_bytes = sum(len(data) for data in files.values())
    sides: dict[str, Callable[[], Any]] = {
        "save": trainer.checkpoints.save,
        "raw_write": lambda: write_raw(files, scratch),
        "load": lambda: trainer.checkpoints._load(path, metadata),
        "raw_read": lambda: read_raw(path),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            shutil.rmtree(scratch, ignore_errors=True)
            drop_from_cache(path)
            speeds[name].append(num_bytes / seconds(side) / 1e6)
    return speeds, num_bytes


def measure_cost(trainer: Trainer, args: argparse.Namespace) -> dict[str, float]:
    """Seconds that a save takes from the training, and those that `save` itself takes."""
    student = trainer.models["student"]
    latent = torch.randn(1, 16, 1, args.latent_size, args.latent_size)
    text = Conditioning(torch.randn(1, TEXT_LENGTH, TEXT_DIM), torch.ones(1, TEXT_LENGTH, dtype=torch.bool))

    def step() -> None:
        student.predict_velocity(latent, torch.full((1,), 0.5), text).square().mean().backward()
        student.transformer.zero_grad()

    manager = trainer.checkpoints
    costs: dict[str, list[float]] = {key: [] for key in ("sync", "async", "async_call")}
    for _ in range(args.repeats):
        for name in ("sync", "async"):
            alone = statistics.median(seconds(step) for _ in range(5))
            manager.options.async_save = name == "async"
            began, steps = time.perf_counter(), 0
            called = seconds(manager.save)
            while manager._pending is not None and not manager._pending.is_written():
                step()
                steps += 1
            manager.finish()
            costs[name].append(time.perf_counter() - began - steps * alone)
            if name == "async":
                costs["async_call"].append(called)
    return {name: statistics.median(values) for name, values in costs.items()}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as output_dir:
        trainer = make_trainer(args, output_dir)
        trainer.train()
        speeds, num_bytes = measure_speeds(trainer, args, Path(output_dir) / "raw")
        cost = measure_cost(trainer, args)
        trainer.accelerator.end_training()
    ratios = {
        name: [ours / raw for ours, raw in zip(speeds[name], speeds[other], strict=True)]
        for name, other in (("save", "raw_write"), ("load", "raw_read"))
    }
    result = {
        "benchmark": "checkpoint",
        "ratio": round(statistics.median(ratios["save"]), 3),
        "target_ratio": 0.8,
        "ratios": [round(ratio, 3) for ratio in ratios["save"]],
        "ratio_load": round(statistics.median(ratios["load"]), 3),
        "ratios_load": [round(ratio, 3) for ratio in ratios["load"]],
        "mb_per_s": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "cost_s": {name: round(value, 3) for name, value in cost.items()},
        "cost_async_over_sync": round(cost["async"] / cost["sync"], 3),
        "mb": round(num_bytes / 1e6, 1),
        "parameters": sum(parameter.numel() for parameter in trainer.models["student"].transformer.parameters()),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
