"""A tiny pipeline whose network is large enough that activations and weights outweigh constants."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from tiny_models import LATENT_CHANNELS, TEXT_DIM, make_tiny_wan_directory

from fv_distill.data import write_rows

LATENT_SHAPE = (LATENT_CHANNELS, 6, 16, 16)


def make_wide_directory(path: Path, *, num_layers: int) -> Path:
    """The tiny pipeline with a wider network, 384 tokens per clip of `LATENT_SHAPE`."""
    make_tiny_wan_directory(path)
    torch.manual_seed(0)
    WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=768,
        num_layers=num_layers,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    ).save_pretrained(path / "transformer")
    return path


def make_wide_rows(path: Path) -> Path:
    """Four rows with clips and captions."""
    generator = torch.Generator().manual_seed(0)
    path.mkdir()
    rows = [
        {
            "id": str(index),
            "file_name": f"{index}.mp4",
            "caption": "a digit",
            "media_type": "video",
            "width": 128,
            "height": 128,
            "num_frames": 21,
            "duration_sec": 1.0,
            "fps": 21.0,
            "vae_latent": torch.randn(LATENT_SHAPE, generator=generator),
            "text_embedding": torch.randn(4, TEXT_DIM, generator=generator),
        }
        for index in range(4)
    ]
    write_rows(path / "rows.parquet", rows)
    return path
