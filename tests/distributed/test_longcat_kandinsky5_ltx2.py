"""LongCat-Video, Kandinsky 5 and LTX-2 on two processes: the losses and weights of one at the full batch.

Their networks have what Wan's hasn't: layers that compute in float32 whatever the weights' type, frames that are given,
clips that are run one by one, and branches that are frozen inside blocks that are trained.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_hunyuan import POOLED_DIM
from tiny_kandinsky5 import make_tiny_kandinsky5_directory, make_tiny_kandinsky5_i2v_directory
from tiny_longcat import make_tiny_longcat_directory
from tiny_ltx2 import make_tiny_ltx2_directory
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_runs import checkpoint, dmd2_config, largest_difference, metrics, train, write_config

from fv_distill.data import write_rows
from fv_distill.export import load_role_weights

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs/accelerate"
RUNNER = Path(__file__).with_name("parallel_runs.py")
GLOBAL_BATCH = 4
CHECKPOINTING = {"training.model.gradient_checkpointing": True}
# SGD: Adam divides by the gradient's size and would blow rounding up where that is nearly zero.
SGD = {"_target_": "torch.optim.SGD", "learning_rate": 0.05, "betas": None, "eps": None, "weight_decay": 0.0}
FAMILIES = {
    "longcat": (make_tiny_longcat_directory, {"_target_": "fv_distill.models.LongCatVideoModel"}, (4, 3, 4, 4)),
    "kandinsky5": (make_tiny_kandinsky5_directory, {"_target_": "fv_distill.models.Kandinsky5Model"}, (4, 3, 4, 4)),
    "kandinsky5_i2v": (
        make_tiny_kandinsky5_i2v_directory,
        {"_target_": "fv_distill.models.Kandinsky5Model", "condition_frames": 1},
        (4, 5, 4, 4),
    ),
    "ltx2": (
        make_tiny_ltx2_directory,
        {"_target_": "fv_distill.models.LTX2VideoModel", "flow_shift": 8.0},
        (4, 3, 2, 2),
    ),
}
# Family, file of configs/accelerate, and what differs.
EQUAL = {
    "longcat-ddp": ("longcat", "cpu_2proc", {}),
    "longcat-fsdp2": ("longcat", "cpu_2proc_fsdp2", CHECKPOINTING),
    "kandinsky5-ddp": ("kandinsky5", "cpu_2proc", {}),
    "kandinsky5-fsdp2": ("kandinsky5", "cpu_2proc_fsdp2", CHECKPOINTING),
    "kandinsky5_i2v-fsdp2": ("kandinsky5_i2v", "cpu_2proc_fsdp2", CHECKPOINTING),
    "ltx2-ddp": ("ltx2", "cpu_2proc", {}),
    "ltx2-fsdp2": ("ltx2", "cpu_2proc_fsdp2", CHECKPOINTING),
}
CLOSE = {"longcat-fsdp2-bf16": ("longcat", "fsdp2_8gpu", CHECKPOINTING)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def configs(folder):
    made = {}
    for name, (make, options, shape) in FAMILIES.items():
        rows = folder / f"{name}-rows"
        generator = torch.Generator().manual_seed(0)
        write_rows(
            rows / "rows.parquet",
            [
                {
                    "caption": "a digit",
                    "vae_latent": torch.randn(shape, generator=generator),
                    "text_embedding": torch.randn(TEXT_LENGTH - index % 3, TEXT_DIM, generator=generator),
                    "pooled_text_embedding": torch.randn(POOLED_DIM, generator=generator),
                }
                for index in range(6)
            ],
        )
        config = made[name] = dmd2_config(make(folder / f"{name}-model"), rows, folder / name)
        for role in config["models"].values():
            role |= options
        config["method"]["fake_score_learning_rate"] = 0.05
        config["training"]["optimizer"] = dict(SGD)
        config["training"]["loop"]["max_train_steps"] = 2
        config["training"]["checkpoint"]["every_steps"] = 0
    made["longcat"]["models"]["student"]["condition_frames"] = 1
    return made


@pytest.fixture(scope="module")
def found(configs, folder):
    """All runs, by one launch of two processes."""
    specs = []
    for name, (family, mode, overrides) in {**EQUAL, **CLOSE}.items():
        words = ["--config_file", str(CONFIGS / f"{mode}.yaml"), "script.py"]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        environment = {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(("ACCELERATE_", "FSDP_"))}
        path = write_config(configs[family], folder / f"{name}.yaml")
        size = {"training.data.train_batch_size": GLOBAL_BATCH // 2, "training.output_dir": str(folder / name)}
        specs.append({"name": name, "config": str(path), "overrides": size | overrides, "environment": environment})
    (folder / "runs.json").write_text(json.dumps(specs))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, "-m", *launcher, str(RUNNER), str(folder / "runs.json"), str(folder / "found.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(configs, folder):
    """The same runs by one process, by family."""
    size = {"training.data.train_batch_size": GLOBAL_BATCH}
    return {
        family: train(config, {**size, "training.output_dir": str(folder / f"{family}-alone")})
        for family, config in configs.items()
    }


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_make_the_run_of_one(name, found, alone, folder):
    assert "error" not in found[name], found[name]
    reference = alone[EQUAL[name][0]]
    for line, expected in zip(metrics(folder / name), metrics(reference), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for role in ("student", "critic", "ema"):
        ours, theirs = (load_role_weights(checkpoint(out, 2), role) for out in (folder / name, reference))
        assert largest_difference(ours, theirs) < 1e-5
    if name.endswith("fsdp2"):
        assert found[name]["roles"]["student"]["units"] >= 3, "sharded block by block"


def test_mixed_precision_is_close(found, alone, folder):
    (name,) = CLOSE
    assert "error" not in found[name], found[name]
    for line, expected in zip(metrics(folder / name), metrics(alone["longcat"]), strict=True):
        assert line["loss/critic"] == pytest.approx(expected["loss/critic"], rel=0.05)
