"""Runs of two steps of the Wan family's further networks, and rows for them."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_wan import (
    CLIP_TEXT_LENGTH,
    make_ti2v_directory,
    make_wan21_i2v_directory,
    make_wan22_i2v_directory,
    make_wan22_t2v_directory,
)

from fv_distill.data import write_rows
from fv_distill.models.wan_encoders import WanImageEncoders

MAKERS = {
    "wan21_i2v": make_wan21_i2v_directory,
    "wan22_i2v": make_wan22_i2v_directory,
    "ti2v": make_ti2v_directory,
    "wan22_t2v": make_wan22_t2v_directory,
}
IMAGE = {"_target_": "fv_distill.models.WanImageToVideoModel"}
LATENT_SHAPE = (4, 3, 4, 4)


def size_of(name: str) -> int:
    """Of the clips' sides: four latent pixels."""
    return 64 if name == "ti2v" else 32


def write_clips(directory: Path, path: Path, *, seed: int = 0, count: int = 4) -> Path:
    """Rows of a directory's own encoders, as preprocessing writes them."""
    encoders = WanImageEncoders(directory, device=torch.device("cpu"), dtype=torch.float32, text_length=TEXT_LENGTH)
    generator = torch.Generator().manual_seed(seed)
    size = size_of(directory.name)
    rows = []
    for _ in range(count):
        video = torch.rand(1, 3, 9, size, size, generator=generator)
        features = {} if directory.name == "wan22_t2v" else encoders.encode_images(video)
        rows.append(
            {
                "caption": "a digit",
                "num_frames": 9,
                "vae_latent": encoders.encode_video(video)[0],
                "text_embedding": torch.randn(4, TEXT_DIM, generator=generator),
                **{column: value[0] for column, value in features.items()},
            }
        )
    write_rows(path / "rows.parquet", rows)
    return path


def finetune_config(directory: Path, rows: Path, output_dir: Path, **model: Any) -> dict[str, Any]:
    """Flow matching on clips."""
    return {
        "models": {"student": {"init_from": str(directory), "trainable": True, **model}},
        "method": {"_target_": "fv_distill.methods.FineTuneMethod"},
        "training": {
            "output_dir": str(output_dir),
            "data": {
                "data_path": str(rows),
                "train_batch_size": 2,
                "text_length": CLIP_TEXT_LENGTH if "wan21" in directory.name else TEXT_LENGTH,
                "caption_dropout": 0.3,
                "cache_dir": str(rows.with_name(f"{rows.name}-cache")),
            },
            "optimizer": {"learning_rate": 1e-3},
            "loop": {"max_train_steps": 2},
            "checkpoint": {"every_steps": 1},
            "tracker": {"trackers": []},
        },
    }


def dmd2_config(directory: Path, rows: Path, output_dir: Path, **model: Any) -> dict[str, Any]:
    """Both networks are updated in every step."""
    config = finetune_config(directory, rows, output_dir, **model)
    config["models"] |= {
        "teacher": {"init_from": str(directory), **model},
        "critic": {"init_from": str(directory), "trainable": True, **model},
    }
    config["method"] = {
        "_target_": "fv_distill.methods.DMD2Method",
        "dmd_denoising_steps": [1000, 500],
        "generator_update_interval": 1,
        "real_score_guidance_scale": 3.0,
    }
    return config


# The network's options, and what a run of it needs beside them.
RUNS = {
    "wan21_i2v": ("wan21_i2v", IMAGE, {"cfg_uncond": {"image": "zero"}}),
    "ti2v": ("ti2v", IMAGE, {"cfg_uncond": {"image": "drop"}}),
    "wan22_i2v_high": ("wan22_i2v", {**IMAGE, "expert": "high"}, {}),
    "wan22_t2v_high": ("wan22_t2v", {"expert": "high"}, {}),
    "wan22_t2v_low": ("wan22_t2v", {"expert": "low"}, {"rollout_mode": "data_latent"}),
    "wan22_i2v_low": ("wan22_i2v", {**IMAGE, "expert": "low"}, {}),
}
