"""A complete Wan pipeline directory with random weights, small enough to be made in every test session."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = [
    "a",
    "the",
    "handwritten",
    "digit",
    "zero",
    "one",
    "two",
    "three",
    "moving",
    "left",
    "right",
    "up",
    "down",
    "bad",
]
TEXT_DIM = 16
LATENT_CHANNELS = 4
TEXT_LENGTH = 8
FLOW_SHIFT = 3.0


def make_tiny_transformer(seed: int = 0, *, num_layers: int = 2, width: int = 24) -> WanTransformer3DModel:
    """Two blocks, two heads; gates and output are random so that every input matters to the output."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=num_layers,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def make_tiny_vae(**options: Any) -> AutoencoderKLWan:
    """Temporal 4, spatial 8."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
        **options,
    )


def make_tiny_wan_directory(path: Path, *, seed: int = 0) -> Path:
    """Save tokenizer, text encoder, VAE (temporal 4, spatial 8), transformer and scheduler as one pipeline."""
    torch.manual_seed(seed)
    vae = make_tiny_vae()
    pipeline = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_text_encoder(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=make_tiny_transformer(seed),
    )
    pipeline.save_pretrained(path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()
