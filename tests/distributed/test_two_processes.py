"""Two gloo processes, with replicated (DDP) and with sharded (FSDP2) weights, against one process."""

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
    largest_difference,
    metadata,
    metrics,
    self_forcing_config,
    train,
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
def one_process(config, folder):
    return train(config, {"training.output_dir": str(folder / "one"), "training.data.train_batch_size": 4})


@pytest.fixture(scope="module")
def ddp(path, folder):
    launch(path, "--output-dir", folder / "ddp")
    return folder / "ddp"


@pytest.fixture(scope="module")
def fsdp2(path, folder):
    launch(path, "--output-dir", folder / "fsdp2", environment=FSDP2)
    return folder / "fsdp2"


def assert_same_run(output_dir, reference):
    """The same losses and weights up to summation order."""
    lines, expected = metrics(output_dir), metrics(reference)
    assert len(lines) == 4
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    for name in NETWORKS:
        weights = {step: load_role_weights(checkpoint(output_dir, step), name) for step in (2, 4)}
        assert largest_difference(weights[4], load_role_weights(checkpoint(reference, 4), name)) < 1e-6
        assert largest_difference(weights[2], weights[4]) > 1e-3, "weights that don't move prove nothing"


def test_replicated_weights_train_as_one_process_does(ddp, one_process):
    facts = metadata(checkpoint(ddp, 4))
    assert (facts["world_size"], facts["sharded"], facts["global_batch_size"]) == (2, False, 4)
    assert_same_run(ddp, one_process)


def test_replicated_weights_accumulate(path, folder, one_process):
    words = ("--training.data.train_batch_size", 1, "--training.loop.gradient_accumulation_steps", 2)
    launch(path, "--output-dir", folder / "accumulated", *words)
    facts = metadata(checkpoint(folder / "accumulated", 4))
    assert (facts["world_size"], facts["sharded"], facts["global_batch_size"]) == (2, False, 4)
    assert_same_run(folder / "accumulated", one_process)


def test_sharded_weights_train_as_one_process_does(fsdp2, one_process):
    facts = metadata(checkpoint(fsdp2, 4))
    assert (facts["world_size"], facts["sharded"], facts["global_batch_size"]) == (2, True, 4)
    assert len(list(checkpoint(fsdp2, 4).glob("student-*.safetensors"))) == 2
    assert_same_run(fsdp2, one_process)


def test_a_sharded_checkpoint_becomes_a_stock_pipeline(fsdp2, folder):
    python("fv_distill", "export", "--checkpoint", checkpoint(fsdp2, 4), "--output-dir", folder / "student")
    exported = load_file(folder / "student/transformer/diffusion_pytorch_model.safetensors")
    assert_same_tensors(exported, load_role_weights(checkpoint(fsdp2, 4), "ema"))
    pipeline = WanPipeline.from_pretrained(folder / "student")
    call = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}
    frames = pipeline("a digit", num_inference_steps=2, guidance_scale=1.0, output_type="pt", **call).frames
    assert frames.shape == (1, 9, 3, 32, 32) and torch.isfinite(frames).all()


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["replicated", "sharded"])
def test_self_forcing_trains_as_one_process_does(tiny_wan, tiny_rows, tmp_path, environment):
    """Several backward passes of an update, over caches that each process has of its own samples."""
    config = self_forcing_config(tiny_wan, tiny_rows, tmp_path / "none")
    config["method"] |= {"fake_score_learning_rate": 0.2, "student_sample_type": "sde"}
    config["training"]["optimizer"] = dict(SGD)
    reference = train(config, {"training.output_dir": str(tmp_path / "one"), "training.data.train_batch_size": 4})
    launch(write_config(config, tmp_path / "run.yaml"), "--output-dir", tmp_path / "two", environment=environment)
    assert_same_run(tmp_path / "two", reference)
