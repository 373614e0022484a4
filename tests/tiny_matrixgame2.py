"""A Matrix-Game 2 directory with random weights, and rows for it, small enough to be made in every test session."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import make_tiny_vae
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from fv_distill.data import write_rows
from fv_distill.models.transformers import MatrixGame2Transformer3DModel

CHANNELS = 4
IMAGE_DIM = 8
# A square of 16 pixels in patches of 8, and the class token.
IMAGE_TOKENS = 5
KEYS = 3
FLOW_SHIFT = 5.0
LATENT_SHAPE = (CHANNELS, 3, 4, 4)
NUM_FRAMES = 9
ACTION_CONFIG: dict[str, Any] = {
    "blocks": [0],
    "enable_keyboard": True,
    "enable_mouse": True,
    "heads_num": 2,
    "hidden_size": 6,
    "img_hidden_size": 24,
    "keyboard_dim_in": KEYS,
    "keyboard_hidden_dim": 16,
    "mouse_dim_in": 2,
    "mouse_hidden_dim": 16,
    "mouse_qk_dim_list": [4, 2, 2],
    "patch_size": [1, 2, 2],
    "qk_norm": True,
    "qkv_bias": False,
    "rope_dim_list": [4, 2, 2],
    "rope_theta": 256,
    "vae_time_compression_ratio": 4,
    "windows_size": 2,
}


def make_network(seed: int = 0, *, num_layers: int = 2, **action: Any) -> MatrixGame2Transformer3DModel:
    """Two blocks, of which the first has an action module; everything is random, so that every input matters."""
    torch.manual_seed(seed)
    return MatrixGame2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2 * CHANNELS + 4,
        out_channels=CHANNELS,
        image_dim=IMAGE_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=num_layers,
        action_config=ACTION_CONFIG | action,
    )


def make_directory(path: Path, *, seed: int = 0, **action: Any) -> Path:
    """Save VAE (temporal 4, spatial 8), image encoder, network and scheduler as one pipeline directory."""
    torch.manual_seed(seed)
    make_tiny_vae().save_pretrained(path / "vae")
    encoder = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(encoder).save_pretrained(path / "image_encoder")
    make_network(seed, **action).save_pretrained(path / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "MatrixGame2Pipeline",
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["fv_distill.models.transformers.matrixgame2", "MatrixGame2Transformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def conditions(batch: int = 2, *, latent_frames: int = 3, seed: int = 5) -> dict[str, Tensor]:
    """Random conditions of clips of 4 x 4 latents, by data column."""
    generator = torch.Generator().manual_seed(seed)
    frames = 4 * (latent_frames - 1) + 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "first_frame_latent": draw(CHANNELS, latent_frames, 4, 4),
        "clip_feature": draw(IMAGE_TOKENS, IMAGE_DIM),
        "mouse_cond": draw(frames, 2),
        "keyboard_cond": (draw(frames, KEYS) > 0).float(),
    }


def make_rows(directory: Path, *, num_rows: int = 4) -> Path:
    """Rows without text, of clips of 9 frames at 32 x 32."""
    found = conditions(num_rows)
    latents = torch.randn(num_rows, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    rows = [
        {
            "id": str(index),
            "caption": "",
            "num_frames": NUM_FRAMES,
            "text_embedding": None,
            "vae_latent": latents[index],
            **{name: value[index] for name, value in found.items()},
        }
        for index in range(num_rows)
    ]
    write_rows(directory / "rows.parquet", rows)
    return directory
