"""Tiny pipeline directories of Wan's further networks: image-to-video, TI2V and two experts."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_models import FLOW_SHIFT, LATENT_CHANNELS, TEXT_DIM, _text_encoder, _tokenizer, make_tiny_vae
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

IMAGE_DIM, IMAGE_TOKENS = 12, 5
BOUNDARY = 0.875
# Wan 2.1's image attention takes 512 tokens for text.
CLIP_TEXT_LENGTH = 512


def make_transformer(seed: int, **options: Any) -> WanTransformer3DModel:
    """As `make_tiny_transformer`, with a family's further options."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "text_dim": TEXT_DIM,
            "freq_dim": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "cross_attn_norm": True,
            "rope_max_seq_len": 32,
            **options,
        }
    )


def make_wan21_i2v_directory(path: Path, *, seed: int = 0) -> Path:
    """CLIP features, and a mask and latents of the image beside the noisy ones."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    network = make_transformer(seed, in_channels=2 * LATENT_CHANNELS + 4, image_dim=IMAGE_DIM, added_kv_proj_dim=24)
    _save_image_pipeline(
        path, transformer=network, image_encoder=CLIPVisionModel(config).eval(), image_processor=processor
    )
    return path


def make_wan22_i2v_directory(path: Path, *, seed: int = 0) -> Path:
    """Two experts that see the image beside the noisy latents, without CLIP."""
    networks = [make_transformer(seed + number, in_channels=2 * LATENT_CHANNELS + 4) for number in range(2)]
    _save_image_pipeline(path, transformer=networks[0], transformer_2=networks[1], boundary_ratio=BOUNDARY)
    return path


def make_ti2v_directory(path: Path, *, seed: int = 0) -> Path:
    """A timestep per token, and a VAE that folds pixels by 16; its index names the text-to-video pipeline."""
    vae = _vae(patch_size=2, scale_factor_spatial=16, in_channels=12, out_channels=12, is_residual=True)
    pipeline = WanPipeline(**_parts(vae=vae), transformer=make_transformer(seed), expand_timesteps=True)
    pipeline.save_pretrained(path)
    return path


def make_wan22_t2v_directory(path: Path, *, seed: int = 0) -> Path:
    """Two text-to-video experts."""
    networks = [make_transformer(seed + number) for number in range(2)]
    WanPipeline(
        **_parts(), transformer=networks[0], transformer_2=networks[1], boundary_ratio=BOUNDARY
    ).save_pretrained(path)
    return path


def _save_image_pipeline(path: Path, **parts: Any) -> None:
    WanImageToVideoPipeline(**_parts(), **parts).save_pretrained(path)


def _parts(vae: AutoencoderKLWan | None = None) -> dict[str, Any]:
    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _text_encoder(),
        "vae": vae or _vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    }


def _vae(**options: Any) -> AutoencoderKLWan:
    torch.manual_seed(5)
    return make_tiny_vae(**options)
