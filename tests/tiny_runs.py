"""Runs of a few steps on the tiny network, and what they leave behind."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import TEXT_LENGTH

from fv_distill.export.checkpoint_weights import load_checkpoint_tensors, read_stored_tensors
from fv_distill.training import run_training_from_config

# Three chunks, as the tiny rows have three latent frames.
CAUSAL = {"_target_": "fv_distill.models.CausalWanModel", "chunk_size": 1}


def dmd2_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """Every second step also updates the student; schedules, averaging and clipping are all at work."""
    return {
        "models": {
            "student": {"init_from": str(model), "trainable": True, "negative_prompt": "bad"},
            "teacher": {"init_from": str(model)},
            "critic": {"init_from": str(model), "trainable": True},
        },
        "method": {
            "_target_": "fv_distill.methods.DMD2Method",
            "dmd_denoising_steps": [1000, 500],
            "generator_update_interval": 2,
            "real_score_guidance_scale": 3.0,
            "fake_score_learning_rate": 2e-3,
        },
        "training": _training(rows, output_dir),
        "callbacks": {"ema": {"decay": 0.5}, "grad_clip": {"max_grad_norm": 0.1}},
    }


def finetune_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """Plain flow matching."""
    return {
        "models": {"student": {"init_from": str(model), "trainable": True}},
        "method": {"_target_": "fv_distill.methods.FineTuneMethod"},
        "training": _training(rows, output_dir),
    }


def kd_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """Paths of three states, two from each row."""
    return {
        "models": {
            "student": {"init_from": str(model), "trainable": True},
            "teacher": {"init_from": str(model), "negative_prompt": "bad"},
        },
        "method": {
            "_target_": "fv_distill.methods.KDMethod",
            "teacher_path_cache": str(output_dir.with_name(f"{output_dir.name}-paths")),
            "t_list": [999, 500, 0],
            "teacher_inference_steps": 4,
            "trajectories_per_row": 2,
            "trajectories_per_file": 3,
            "trajectory_batch_size": 2,
        },
        "training": _training(rows, output_dir),
    }


def causal_kd_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """The same for a causal student."""
    config = kd_config(model, rows, output_dir)
    config["models"]["student"] |= CAUSAL
    config["method"]["_target_"] = "fv_distill.methods.KDCausalMethod"
    return config


def dfsft_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """Teacher forcing with a causal student."""
    return {
        "models": {"student": {"init_from": str(model), "trainable": True, **CAUSAL}},
        "method": {
            "_target_": "fv_distill.methods.DiffusionForcingSFTMethod",
            "chunk_size": 1,
            "teacher_forcing": True,
        },
        "training": _training(rows, output_dir),
    }


def self_forcing_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """As `dmd2_config`, with a causal student."""
    config = dmd2_config(model, rows, output_dir)
    config["models"]["student"] |= CAUSAL
    config["method"]["_target_"] = "fv_distill.methods.SelfForcingMethod"
    return config


def shared_base_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """As `dmd2_config`, with student and critic as adapters on the teacher's weights."""
    config = dmd2_config(model, rows, output_dir)
    role = {"share_base_with": "teacher", "trainable": True, "lora": {"enable": True, "rank": 3}}
    config["models"] |= {"student": {**role, "negative_prompt": "bad"}, "critic": dict(role)}
    return config


def shared_causal_base_config(model: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """The same for Self-Forcing: a causal student on a bidirectional teacher's weights."""
    config = shared_base_config(model, rows, output_dir)
    config["models"]["student"] |= CAUSAL
    config["method"]["_target_"] = "fv_distill.methods.SelfForcingMethod"
    return config


def _training(rows: Path, output_dir: Path) -> dict[str, Any]:
    return {
        "seed": 7,
        "output_dir": str(output_dir),
        "data": {
            "data_path": str(rows),
            "text_length": TEXT_LENGTH,
            "train_batch_size": 2,
            "cache_dir": str(rows.with_name(f"{rows.name}-cache")),
        },
        "optimizer": {"learning_rate": 1e-3},
        "loop": {"max_train_steps": 4},
        "checkpoint": {"every_steps": 2},
        # Windows that don't end where checkpoints are.
        "tracker": {"trackers": [], "sigma_losses_every_steps": 3},
    }


def write_config(config: dict[str, Any], path: Path, overrides: dict[str, Any] | None = None) -> Path:
    """Save as YAML with some dotted keys replaced."""
    config = copy.deepcopy(config)
    for dotted, value in (overrides or {}).items():
        section = config
        *parents, last = dotted.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: dict[str, Any], overrides: dict[str, Any] | None = None) -> Path:
    """Run a config from a YAML beside its output directory and return that directory."""
    output_dir = Path((overrides or {}).get("training.output_dir", config["training"]["output_dir"]))
    path = write_config(config, output_dir.with_name(f"{output_dir.name}.yaml"))
    return run_training_from_config(path, overrides=overrides)


def metric_lines(output_dir: Path) -> list[str]:
    """`metrics.jsonl` as it is written."""
    return (output_dir / "metrics.jsonl").read_text().splitlines()


def sigma_lines(output_dir: Path) -> list[str]:
    """`sigma_losses.jsonl` as it is written."""
    return (output_dir / "sigma_losses.jsonl").read_text().splitlines()


def approx_losses(losses: list[float | None]) -> list[Any]:
    """Equal to means per bin up to rounding; an empty bin is empty."""
    return [loss if loss is None else pytest.approx(loss, rel=1e-5) for loss in losses]


def metrics(output_dir: Path) -> list[dict[str, float]]:
    """`metrics.jsonl`, parsed."""
    return [json.loads(line) for line in metric_lines(output_dir)]


def checkpoint(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return output_dir / "checkpoints" / f"step-{step:08d}"


def metadata(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return json.loads((directory / "metadata.json").read_text())


def groups(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, whole: `student`, `student.optimizer`, ..."""
    return {name: load_checkpoint_tensors(directory, name) for name in read_stored_tensors(directory)}


def assert_same_state(one: Path, other: Path, *, num_networks: int, num_optimizers: int) -> None:
    """Two checkpoints hold the same bits, however many processes wrote them."""
    ours, theirs = groups(one), groups(other)
    optimizers = [name for name in ours if name.endswith(".optimizer")]
    assert (len(ours) - len(optimizers), len(optimizers)) == (num_networks, num_optimizers)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_same_tensors(ours[name], theirs[name])
    assert metadata(one)["optimizers"] == metadata(other)["optimizers"]
    assert metadata(one)["updates"] == metadata(other)["updates"]


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal names and bits."""
    assert one.keys() == other.keys() and one
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of two sets of weights."""
    assert one.keys() == other.keys() and one
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)
