"""What each process of an FSDP2 run keeps in memory, against its share of what one process keeps.

A DMD2 run of two steps, both roles updated in each, on 1, 2 and 4 CPU processes (torchrun, gloo). Every process adds
up its own shards of the student's, critic's, teacher's and average's weights, of the gradients of both trained roles
before their optimizers step, and of the optimizers' states. The ratio is the fullest process's bytes times the
processes, over the bytes of one process that has all: 1 is ideal, and what is above is parameters that don't divide
evenly. `live` counts all tensors that are alive before an optimizer's step, whoever holds them: a network that stayed
gathered would show. It is no peak: that is at least one gathered block and the activations higher. Prints a JSON line.

    python benchmarks/fsdp_memory.py
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from dmd2_roles import make_models
from step_overhead import LEARNING_RATE, ROOT
from torch.distributed.tensor import DTensor

from fv_distill.callbacks import Callback
from fv_distill.config import load_run_config
from fv_distill.methods import DMD2Method, DMD2Options
from fv_distill.training import Trainer, build_accelerator, build_callbacks, build_dataset

STEPS = 2
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="the first has to be 1")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--latent-frames", type=int, default=2)
    parser.add_argument("--latent-size", type=int, default=8, help="height and width; a token is 2 x 2")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.processes[0] != 1:
        parser.error("--processes has to begin with 1, which the others are compared with")
    return args


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of this process's shards."""
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


def live_bytes() -> int:
    """Bytes of all storages that any tensor of this process uses; a sharded tensor's is its shard's."""
    storages = {}
    for thing in gc.get_objects():
        # `isinstance` would wake up modules that are only imported on use.
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, DTensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Weigh(Callback):
    """Looks at the last step: gradients before each optimizer's step, everything else after it."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def on_before_optimizer_step(self, trainer: Trainer, role: str, metrics: Mapping[str, torch.Tensor]) -> None:
        if trainer.step == STEPS:
            parameters = trainer.models[role].transformer.parameters()
            self.bytes["gradients"] += local_bytes(parameter.grad for parameter in parameters)
            gc.collect()
            self.bytes["live"] = max(self.bytes["live"], live_bytes())

    def on_train_end(self, trainer: Trainer) -> None:
        weights = {role: list(model.transformer.parameters()) for role, model in trainer.models.items()}
        weights["ema"] = list(trainer.callbacks["ema"].average.values())
        for name, tensors in weights.items():
            self.bytes[f"weights/{name}"] = local_bytes(tensors)
        for role in trainer.roles.values():
            states = role.optimizer.state.values()
            self.bytes["optimizer"] += local_bytes(value for state in states for value in state.values())


def work(args: argparse.Namespace) -> None:
    """One process: train and write down what was weighed."""
    torch.set_num_threads(1)
    overrides: dict[str, Any] = {
        "training.output_dir": str(args.worker / "run"),
        "training.data.data_path": str(ROOT / "examples/digits/data/prompts"),
        "training.data.cache_dir": str(args.worker / "cache"),
        "training.data.latent_shape": [16, args.latent_frames, args.latent_size, args.latent_size],
        "training.data.train_batch_size": 1,
        "training.optimizer": {"learning_rate": LEARNING_RATE},
        "training.loop.max_train_steps": STEPS,
        "training.checkpoint.every_steps": 0,
        "training.tracker.trackers": [],
        "callbacks.ema.decay": 0.95,
    }
    config = load_run_config(ROOT / "examples/configs/dmd2/digits.yaml", overrides)
    accelerator = build_accelerator(config)
    assert accelerator.is_fsdp2 == (accelerator.num_processes > 1)
    models = make_models(args.width, args.layers)
    callbacks = build_callbacks(config)
    weigh = Weigh()
    callbacks.add("weigh", weigh)
    method = DMD2Method(models, DMD2Options(generator_update_interval=1))
    trainer = Trainer(accelerator, method, build_dataset(config), config, callbacks)
    parameters = sum(parameter.numel() for parameter in models["student"].transformer.parameters())
    trainer.train()
    result = {"bytes": dict(weigh.bytes), "parameters": parameters}
    (args.worker / f"rank-{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.end_training()


def measure(num_processes: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What every process of a run of its own weighed."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        launcher = launcher if num_processes > 1 else []
        sizes = ["--width", args.width, "--layers", args.layers]
        sizes += ["--latent-frames", args.latent_frames, "--latent-size", args.latent_size]
        command = [sys.executable, *launcher, __file__, "--worker", folder, *map(str, sizes)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **FSDP2})
        if done.returncode:
            raise RuntimeError(f"{num_processes} processes ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(num_processes)]


def main() -> None:
    args = parse_args()
    if args.worker is not None:
        work(args)
        return
    runs = {count: measure(count, args) for count in args.processes}
    kept = {
        count: max(sum(size for name, size in rank["bytes"].items() if name != "live") for rank in run)
        for count, run in runs.items()
    }
    live = {count: max(rank["bytes"]["live"] for rank in run) for count, run in runs.items()}
    ratios = {count: count * kept[count] / kept[1] for count in kept}
    print(
        json.dumps(
            {
                "benchmark": "fsdp_memory",
                "ratio": round(max(ratios.values()), 4),
                "target_ratio": 1.1,
                "processes": args.processes,
                "ratios": [round(ratio, 4) for ratio in ratios.values()],
                "mb_per_process": [round(size / 1e6, 3) for size in kept.values()],
                "live_mb": [round(size / 1e6, 3) for size in live.values()],
                "live_ratios": [round(count * size / live[1], 4) for count, size in live.items()],
                "mb_of_one": {name: round(size / 1e6, 3) for name, size in runs[1][0]["bytes"].items()},
                "parameters": runs[1][0]["parameters"],
            }
        )
    )


if __name__ == "__main__":
    main()
