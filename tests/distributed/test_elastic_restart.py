"""torchrun starts the processes again after one was killed: they go on by themselves, and nothing of it shows."""

import json
import os
import subprocess
import sys

import pytest
from tiny_runs import (
    assert_same_state,
    assert_same_tensors,
    checkpoint,
    dmd2_config,
    metadata,
    metric_lines,
    write_config,
)

from fv_distill.export import load_role_weights
from fv_distill.training import complete_checkpoints

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# Without it the processes of a second start find the addresses of the first one's in the launcher's store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# Kills one process in the middle of each of some steps, once each: what was killed leaves a file behind.
KILL = """
import os, signal
from pathlib import Path
from fv_distill.callbacks import Callback

class Kill(Callback):
    def __init__(self, steps, folder):
        self.steps, self.folder = steps, Path(folder)

    def on_before_optimizer_step(self, trainer, role, metrics):
        marker = self.folder / f"killed-in-step-{trainer.step}"
        if trainer.accelerator.process_index == 1 and trainer.step in self.steps and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""

# What torchrun does, with processes that are forked: importing everything in each of them is what takes time.
LAUNCH = """
import json, os, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from fv_distill.config import load_run_config
from fv_distill.training import build_trainer

def train(paths):
    for path in paths:
        trainer = build_trainer(load_run_config(path))
        trainer.train()
    trainer.accelerator.end_training()

for environment, paths in json.loads(sys.argv[1]):
    os.environ.update(environment)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=2, start_method="fork", run_id="test",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
    )
    elastic_launch(config, train)(paths)
"""


@pytest.fixture(scope="module")
def runs(tiny_wan, tiny_rows, tmp_path_factory):
    """Runs that were killed before their first checkpoint and after it, and whole ones; and what was printed."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "my_kill.py").write_text(KILL)
    config = dmd2_config(tiny_wan, tiny_rows, folder / "none")
    config["training"]["checkpoint"]["resume_from_checkpoint"] = "auto"
    config["training"]["data"]["train_batch_size"] = 1
    launches = []
    for name, environment in (("replicated", {}), ("sharded", FSDP2)):
        (folder / name).mkdir()
        kill = {"_target_": "my_kill.Kill", "folder": str(folder / name), "steps": [1, 3]}
        paths = []
        for kind, callbacks in (("whole", {}), ("killed", {"callbacks.kill": kill})):
            changes = {"training.output_dir": str(folder / name / kind), **callbacks}
            paths.append(str(write_config(config, folder / f"{name}-{kind}.yaml", changes)))
        launches.append((environment, paths))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, json.dumps(launches)],
        capture_output=True,
        text=True,
        env={**os.environ, **OWN_STORE, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_killed_process_changes_nothing(runs, kind):
    folder, out = runs
    whole, killed = folder / kind / "whole", folder / kind / "killed"
    assert sorted(path.name for path in (folder / kind).glob("killed-*")) == ["killed-in-step-1", "killed-in-step-3"]
    assert out.count(f"resumed from {checkpoint(killed, 2)} at step 2") == 1
    assert metric_lines(killed) == metric_lines(whole)
    assert [path.name for path in complete_checkpoints(killed)] == ["step-00000002", "step-00000004"]
    for name in ("student", "critic", "ema"):
        assert_same_tensors(*(load_role_weights(checkpoint(run, 4), name) for run in (killed, whole)))
    assert metadata(checkpoint(killed, 4))["sharded"] == (kind == "sharded")
    if kind == "replicated":
        assert_same_state(checkpoint(killed, 4), checkpoint(whole, 4), num_networks=3, num_optimizers=2)
