"""The predicted peak against that of a real training step of the real trainer."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measured_memory
import pytest
import torch
from tiny_runs import dmd2_config, finetune_config, self_forcing_config, shared_base_config, write_config

from fv_distill.config import load_run_config
from fv_distill.estimate import Layout
from fv_distill.estimate.estimate import Device, Estimate
from fv_distill.training.estimating import estimate_run

# The issue asks for 15%. One process is met to a thousandth; what FSDP2 gathers is an upper bound.
ONE_PROCESS, TWO_PROCESSES = 0.02, 0.15

DEVICE = Device("none", None, None, 0.4)
ONE_ROW = {"training.data.train_batch_size": 1}
# Student and critic in every step, so that the second has all states. The critic recomputes, the student does not:
# otherwise the critic's whole clip needs more than one replayed chunk.
EVERY_STEP = {**ONE_ROW, "method.generator_update_interval": 1, "models.critic.gradient_checkpointing": True}
CHUNKS = {"models.student.chunk_size": 2}
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "fine-tuning": (finetune_config, ONE_ROW, "student update"),
    "fine-tuning, recomputing, accumulating": (
        finetune_config,
        {**ONE_ROW, "training.model.gradient_checkpointing": True, "training.loop.gradient_accumulation_steps": 2},
        "student update",
    ),
    "dmd2 with an average": (dmd2_config, {**ONE_ROW, "method.generator_update_interval": 1}, "student update"),
    "self-forcing with replay": (self_forcing_config, {**EVERY_STEP, **CHUNKS}, "student update"),
    "dmd2 on a shared base": (
        shared_base_config,
        {**ONE_ROW, "method.generator_update_interval": 1, "training.model.gradient_checkpointing": True},
        "student update",
    ),
    "fine-tuning, bf16": (
        finetune_config,
        {**ONE_ROW, "training.distributed.mixed_precision": "bf16"},
        "student update",
    ),
}


def make_run(make_config: Any, model: Path, rows: Path, folder: Path, overrides: dict[str, Any]) -> Path:
    """A config of two steps that saves only at the end."""
    config = make_config(model, rows, folder / "run")
    common = {"training.checkpoint.every_steps": 0, "training.loop.max_train_steps": 2}
    return write_config(config, folder / "run.yaml", {**common, **overrides})


def worst_of_steps(estimate: Estimate) -> tuple[str, int]:
    """The peak while training, prompts having been encoded."""
    phase = max((phase for phase in estimate.phases if phase.name != "prompts"), key=lambda phase: phase.total)
    return phase.name, phase.total


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_the_measured_one(name, wide_wan, wide_rows, tmp_path):
    make_config, overrides, phase = CASES[name]
    path = make_run(make_config, wide_wan, wide_rows, tmp_path, overrides)
    predicted = worst_of_steps(estimate_run(load_run_config(path), Layout(device_type="cpu"), DEVICE))
    assert predicted[0] == phase
    assert predicted[1] == pytest.approx(measured_peak(path, tmp_path), rel=ONE_PROCESS)


def measured_peak(path, folder, *, launcher=(), environment=None):
    """In a fresh process: what other tests have left in this one would be counted."""
    done = subprocess.run(
        [sys.executable, *launcher, measured_memory.__file__, str(path), "2", str(folder / "peak")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return int((folder / "peak").read_text())


@pytest.mark.slow
def test_the_predicted_peak_of_two_sharded_processes(wide_wan, wide_rows, tmp_path):
    """With accumulation, between which gradients are sharded."""
    overrides = {**ONE_ROW, "method.generator_update_interval": 1, "training.loop.gradient_accumulation_steps": 2}
    overrides |= {"training.model.gradient_checkpointing": True, "training.distributed.mixed_precision": "bf16"}
    path = make_run(dmd2_config, wide_wan, wide_rows, tmp_path, overrides)
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    measured = measured_peak(path, tmp_path, launcher=launcher, environment=environment)
    layout = Layout(2, "sharded", 2, "bf16", device_type="cpu")
    estimate = estimate_run(load_run_config(path), layout, DEVICE)
    assert worst_of_steps(estimate)[1] == pytest.approx(measured, rel=TWO_PROCESSES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_of_a_gpu(name, wide_wan, wide_rows, tmp_path):
    from fv_distill.training.run import build_trainer

    make_config, overrides, _ = CASES[name]
    # Larger clips: the allocator rounds blocks up, which tells on small ones.
    overrides = {**overrides, "training.data.train_batch_size": 4}
    path = make_run(make_config, wide_wan, wide_rows, tmp_path, overrides)
    _, predicted = worst_of_steps(estimate_run(load_run_config(path), Layout(device_type="cuda"), DEVICE))
    trainer = build_trainer(load_run_config(path))
    # The workspaces of the product kernels, which stay.
    torch.nn.functional.linear(*(torch.ones(64, 64, device="cuda") for _ in range(2)), torch.ones(64, device="cuda"))
    before = torch.cuda.memory_allocated()
    own = sum(p.numel() * p.element_size() for m in trainer.models.values() for p in m.transformer.parameters())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before + own, rel=TWO_PROCESSES)
