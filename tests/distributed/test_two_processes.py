"""Checkpoints of two gloo processes, with replicated (DDP) and with sharded (FSDP2) weights."""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from tiny_runs import (
    assert_same_tensors,
    checkpoint,
    dmd2_config,
    metric_lines,
    write_config,
)

from fv_distill.export import load_role_weights

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
NETWORKS = ("student", "critic", "ema")
# SGD: Adam divides by the gradient's size and would blow rounding up where that is nearly zero.
SGD = {"_target_": "torch.optim.SGD", "learning_rate": 1.0, "betas": None, "eps": None, "weight_decay": 0.0}


def python(*words, environment=None, status=0):
    result = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    assert result.returncode == status, result.stdout[-1000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def launch(path, *words, environment=None, status=0):
    """Train on two processes."""
    command = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "fv_distill", "train")
    return python(*command, "--config", path, *words, environment=environment, status=status)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def config(tiny_wan, tiny_rows, folder):
    """Four steps, of which two update the student; global batch 4 on two processes."""
    config = dmd2_config(tiny_wan, tiny_rows, folder / "none")
    config["method"] |= {"fake_score_learning_rate": 0.2, "student_sample_type": "sde"}
    config["training"]["optimizer"] = {**SGD, "lr_scheduler": "linear"}
    config["training"]["data"]["caption_dropout"] = 0.3
    return config


@pytest.fixture(scope="module")
def path(config, folder):
    return write_config(config, folder / "run.yaml")


@pytest.fixture(scope="module")
def ddp(path, folder):
    launch(path, "--output-dir", folder / "ddp")
    return folder / "ddp"


@pytest.fixture(scope="module")
def fsdp2(path, folder):
    launch(path, "--output-dir", folder / "fsdp2", environment=FSDP2)
    return folder / "fsdp2"


def assert_exact_resume(path, output_dir, folder, *, environment=None):
    """Resuming the checkpoint of step 2 elsewhere gives the rest of the run bit for bit."""
    elsewhere = folder / f"{output_dir.name}-resumed"
    launch(
        path, "--output-dir", elsewhere, "--resume-from-checkpoint", checkpoint(output_dir, 2), environment=environment
    )
    assert metric_lines(elsewhere) == metric_lines(output_dir)[2:]
    for name in NETWORKS:
        assert_same_tensors(*(load_role_weights(checkpoint(run, 4), name) for run in (elsewhere, output_dir)))


def test_replicated_weights_resume_exactly(path, ddp, folder):
    assert_exact_resume(path, ddp, folder)


def test_sharded_weights_resume_exactly(path, fsdp2, folder):
    assert_exact_resume(path, fsdp2, folder, environment=FSDP2)


def test_a_sharded_checkpoint_becomes_a_stock_pipeline(fsdp2, folder):
    python("fv_distill", "export", "--checkpoint", checkpoint(fsdp2, 4), "--output-dir", folder / "student")
    exported = load_file(folder / "student/transformer/diffusion_pytorch_model.safetensors")
    assert_same_tensors(exported, load_role_weights(checkpoint(fsdp2, 4), "ema"))
    pipeline = WanPipeline.from_pretrained(folder / "student")
    call = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}
    frames = pipeline("a digit", num_inference_steps=2, guidance_scale=1.0, output_type="pt", **call).frames
    assert frames.shape == (1, 9, 3, 32, 32) and torch.isfinite(frames).all()


def test_replicated_weights_do_not_resume_as_shards(path, ddp, folder):
    words = ("--output-dir", folder / "mixed", "--resume-from-checkpoint", checkpoint(ddp, 2))
    out = launch(path, *words, environment=FSDP2, status=1)
    assert "was saved with replicated weights, this run uses FSDP2; launch it the same way to resume" in out
