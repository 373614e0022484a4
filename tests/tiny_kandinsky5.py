"""Complete Kandinsky 5 pipeline directories with random weights, small enough to be made in every test session."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from tiny_cosmos import make_tiny_qwen
from tiny_hunyuan import LATENT_CHANNELS, POOLED_DIM, make_tiny_clip, make_tiny_hunyuan_vae, make_tiny_tokenizer

TEXT_DIM = 16
FLOW_SHIFT = 5.0


def make_tiny_kandinsky5_transformer(seed: int = 0, **config: object) -> Kandinsky5Transformer3DModel:
    """One block for text, two for clips, two heads; modulation and output, which start at zero, are random."""
    torch.manual_seed(seed)
    sizes = {
        "in_visual_dim": LATENT_CHANNELS,
        "out_visual_dim": LATENT_CHANNELS,
        "in_text_dim": TEXT_DIM,
        "in_text_dim2": POOLED_DIM,
        "time_dim": 16,
        "model_dim": 24,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 4, 4),
        "visual_cond": True,
    }
    transformer = Kandinsky5Transformer3DModel(**{**sizes, **config})
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.3)
    return transformer.eval()


def make_tiny_kandinsky5_directory(path: Path, *, kind: Any = Kandinsky5T2VPipeline, seed: int = 0) -> Path:
    """Save tokenizers, Qwen2.5-VL, CLIP, HunyuanVideo's VAE, transformer and scheduler as one pipeline."""
    torch.manual_seed(seed)
    pipeline = kind(
        text_encoder=make_tiny_qwen(),
        tokenizer=make_tiny_tokenizer({}),
        text_encoder_2=make_tiny_clip(),
        tokenizer_2=make_tiny_tokenizer({}),
        vae=make_tiny_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=make_tiny_kandinsky5_transformer(seed),
    )
    prefix = pipeline.prompt_template.split("{}")[0]
    words = "system " * pipeline.prompt_template_encode_start_idx
    pipeline.register_modules(tokenizer=make_tiny_tokenizer({prefix: words, "<|im_end|>": ""}))
    pipeline.save_pretrained(path)
    return path


def make_tiny_kandinsky5_i2v_directory(path: Path) -> Path:
    """The same as an image-to-video pipeline."""
    return make_tiny_kandinsky5_directory(path, kind=Kandinsky5I2VPipeline)
