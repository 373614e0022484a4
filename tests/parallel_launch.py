"""Runs in parallel modes, chosen as users choose them: by the files of `configs/accelerate`."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_runs import write_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs/accelerate"
RUNNER = Path(__file__).with_name("distributed") / "parallel_runs.py"
GLOBAL_BATCH = 4
DDP, FSDP2, OFFLOAD, HSDP = "cpu_2proc", "cpu_2proc_fsdp2", "fsdp2_offload_8gpu", "cpu_4proc_hsdp"
# SGD: Adam divides by the gradient's size and would blow rounding up where that is nearly zero.
SGD = {"_target_": "torch.optim.SGD", "learning_rate": 0.5, "betas": None, "eps": None, "weight_decay": 0.0}
CHECKPOINTING = {"training.model.gradient_checkpointing": True}


@dataclass(frozen=True)
class Run:
    """A method in a mode: a file of `configs/accelerate`, and what differs in the run's own config."""

    method: str
    mode: str
    overrides: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def environment_of(mode):
    """What `accelerate launch` would set for a file of `configs/accelerate`."""
    words = ["--config_file", str(CONFIGS / f"{mode}.yaml"), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {key: value for key, value in prepare_multi_gpu_env(args).items() if key.startswith(prefixes)}


def launch(num_processes, runs, configs, folder, runner=RUNNER):
    """Make all `runs`; what `parallel_runs` found out, by name."""
    specs = []
    for name, run in runs.items():
        degree = run.overrides.get("training.distributed.context_parallel_degree", 1)
        overrides = {"training.data.train_batch_size": max(1, GLOBAL_BATCH * degree // num_processes)}
        if run.method.startswith("kd"):
            # Made anew, so that the processes' share of the paths is tested too.
            overrides["method.teacher_path_cache"] = str(folder / f"{name}-paths")
        overrides |= {"training.output_dir": str(folder / name), **run.overrides}
        specs.append(
            {
                "name": name,
                "config": str(write_config(configs[run.method], folder / f"{name}.yaml")),
                "overrides": overrides,
                "environment": environment_of(run.mode) | run.environment,
            }
        )
    given, found = folder / f"runs-{num_processes}.json", folder / f"found-{num_processes}.json"
    given.write_text(json.dumps(specs))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes))
    result = subprocess.run(
        [sys.executable, "-m", *launcher, str(runner), str(given), str(found)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    return json.loads(found.read_text()) | {"printed": result.stdout}
