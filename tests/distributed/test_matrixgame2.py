"""Networks with buffers, conditions beside text and caches of several kinds: two processes against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_matrixgame2 import make_directory, make_rows
from tiny_runs import (
    checkpoint,
    dmd2_config,
    largest_difference,
    metrics,
    self_forcing_config,
    train,
    write_config,
)

from fv_distill.export import load_role_weights

CONFIGS = Path(__file__).resolve().parents[2] / "configs/accelerate"
RUNNER = Path(__file__).with_name("parallel_runs.py")
GLOBAL_BATCH = 4
CHECKPOINTING = {"training.model.gradient_checkpointing": True}
# Method, file of configs/accelerate, and what differs.
RUNS = {
    "dmd2-fsdp2": ("dmd2", "cpu_2proc_fsdp2", {}),
    "self_forcing-ddp": ("self_forcing", "cpu_2proc", {}),
    "self_forcing-fsdp2": ("self_forcing", "cpu_2proc_fsdp2", CHECKPOINTING),
}
BF16 = "self_forcing-fsdp2-bf16"
# SGD: Adam divides by the gradient's size and would blow rounding up where that is nearly zero.
SGD = {"_target_": "torch.optim.SGD", "learning_rate": 0.5, "betas": None, "eps": None, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def configs(folder):
    model, rows = make_directory(folder / "model"), make_rows(folder / "rows")
    configs = {
        "dmd2": dmd2_config(model, rows, folder / "dmd2"),
        "self_forcing": self_forcing_config(model, rows, folder / "self_forcing"),
    }
    for config in configs.values():
        for role in config["models"].values():
            role.pop("negative_prompt", None)
            role["_target_"] = f"fv_distill.models.{'Causal' if 'chunk_size' in role else ''}MatrixGame2Model"
        config["training"]["optimizer"] = dict(SGD)
        config["training"]["checkpoint"]["every_steps"] = 0
        config["training"]["loop"]["max_train_steps"] = 2
        config["method"] |= {"fake_score_learning_rate": 0.2, "cfg_uncond": {"action": "zero"}}
    configs["self_forcing"]["models"]["student"] |= {"local_window": 1, "sink_frames": 1}
    return configs


@pytest.fixture(scope="module")
def launched(configs, folder):
    """All runs, by one launch of two processes."""
    specs = []
    for name, (method, mode, overrides) in {**RUNS, BF16: ("self_forcing", "fsdp2_8gpu", CHECKPOINTING)}.items():
        words = ["--config_file", str(CONFIGS / f"{mode}.yaml"), "script.py"]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        environment = {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(("ACCELERATE_", "FSDP_"))}
        path = write_config(configs[method], folder / f"{name}.yaml")
        size = {"training.data.train_batch_size": GLOBAL_BATCH // 2, "training.output_dir": str(folder / name)}
        specs.append({"name": name, "config": str(path), "overrides": size | overrides, "environment": environment})
    (folder / "runs.json").write_text(json.dumps(specs))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, "-m", *launcher, str(RUNNER), str(folder / "runs.json"), str(folder / "found.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one_process(configs, folder):
    """The same runs by one process, by method."""
    size = {"training.data.train_batch_size": GLOBAL_BATCH}
    return {
        method: train(config, {**size, "training.output_dir": str(folder / f"{method}-alone")})
        for method, config in configs.items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_run_of_one(name, launched, one_process):
    reference = one_process[RUNS[name][0]]
    for line, expected in zip(metrics(launched / name), metrics(reference), strict=True):
        for key in (key for key in expected if key.startswith("loss/")):
            assert line[key] == pytest.approx(expected[key], rel=1e-4)
    for role in ("student", "critic", "ema"):
        ours, theirs = (load_role_weights(checkpoint(out, 2), role) for out in (launched / name, reference))
        assert largest_difference(ours, theirs) < 1e-5


def test_mixed_precision_is_close(launched, one_process):
    for line, expected in zip(metrics(launched / BF16), metrics(one_process["self_forcing"]), strict=True):
        for key in (key for key in expected if key.startswith("loss/")):
            assert line[key] == pytest.approx(expected[key], rel=0.1)
