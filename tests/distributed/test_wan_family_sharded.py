"""Image-to-video Wan and experts on two processes, sharded and with shared tokens: one process's losses and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_runs import checkpoint, largest_difference, metrics, train, write_config
from wan_family_runs import IMAGE, MAKERS, dmd2_config, finetune_config, write_clips

from fv_distill.export import load_role_weights

pytestmark = pytest.mark.slow

LAUNCH = Path(__file__).resolve().parents[2] / "configs/accelerate/cpu_2proc_fsdp2.yaml"
RUNNER = Path(__file__).with_name("parallel_runs.py")
# See test_parallel_modes.py.
SGD = {"_target_": "torch.optim.SGD", "learning_rate": 0.5, "betas": None, "eps": None, "weight_decay": 0.0}
TOKENS_SHARED = {"training.distributed.context_parallel_degree": 2, "training.data.train_batch_size": 2}
# Directory, role options, method, overrides of two processes.
RUNS = {
    "clip_features": ("wan21_i2v", IMAGE, dmd2_config, {}),
    "rollouts_over_two_experts": ("wan22_i2v", {**IMAGE, "expert": "low"}, dmd2_config, {}),
    "timesteps_of_tokens_shared": ("ti2v", IMAGE, finetune_config, TOKENS_SHARED),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    directories = {name: make(root / name) for name, make in MAKERS.items()}
    rows = {name: write_clips(directory, root / f"{name}-rows") for name, directory in directories.items()}
    made = {}
    for name, (directory, model, make, _) in RUNS.items():
        config = make(directories[directory], rows[directory], root / name, **model)
        config["training"]["optimizer"] = dict(SGD)
        if name == "rollouts_over_two_experts":
            config["models"]["high_expert"] = {"init_from": str(directories[directory]), **model, "expert": "high"}
        made[name] = config
    return root, made


def environment():
    """What `accelerate launch` would set."""
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(LAUNCH), "script.py"])
    )
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {key: value for key, value in prepare_multi_gpu_env(args).items() if key.startswith(prefixes)}


@pytest.fixture(scope="module")
def two_processes(configs):
    root, made = configs
    specs = [
        {
            "name": name,
            "config": str(write_config(config, root / f"{name}.yaml")),
            "overrides": {"training.data.train_batch_size": 1, **RUNS[name][3]},
            "environment": environment(),
        }
        for name, config in made.items()
    ]
    (root / "runs.json").write_text(json.dumps(specs))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = subprocess.run(
        [sys.executable, "-m", *launcher, str(RUNNER), str(root / "runs.json"), str(root / "found.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(configs, two_processes, name):
    root, made = configs
    assert "error" not in two_processes[name]
    assert two_processes[name]["roles"]["student"]["units"] > 1, "sharded block by block"
    alone = train(made[name], {"training.output_dir": str(root / f"{name}-alone")})
    for line, expected in zip(metrics(root / name), metrics(alone), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    ours, theirs = (load_role_weights(checkpoint(run, 2), "student") for run in (root / name, alone))
    assert largest_difference(ours, theirs) < 1e-4
