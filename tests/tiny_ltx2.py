"""A complete LTX-2 pipeline directory with random weights."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from tiny_models import WORDS, _tokenizer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

TEXT_DIM = 16
LATENT_CHANNELS = 4
NUM_TEXT_LAYERS = 2
# A text has a multiple of so many tokens.
NUM_REGISTERS = 4


def make_tiny_transformer(seed: int = 0, *, is_newer: bool = False, **changes) -> LTX2VideoTransformer3DModel:
    """Two blocks, two heads; `is_newer` is the kind of LTX-2.3."""
    torch.manual_seed(seed)
    config = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 6,
        "audio_cross_attention_dim": 12,
        "num_layers": 2,
        "caption_channels": TEXT_DIM,
        "cross_attn_mod": is_newer,
        "audio_cross_attn_mod": is_newer,
        "use_prompt_embeddings": not is_newer,
        "gated_attn": is_newer,
        "audio_gated_attn": is_newer,
        "perturbed_attn": is_newer,
    }
    return LTX2VideoTransformer3DModel(**config | changes).eval()


def make_tiny_ltx2_directory(path: Path, *, seed: int = 0, is_newer: bool = False) -> Path:
    """Save Gemma, connectors, VAEs (temporal 8, spatial 32), vocoder, transformer and scheduler as one pipeline."""
    torch.manual_seed(seed)
    text_config = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": NUM_TEXT_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    vision_config = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    gemma = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text_config, vision_config=vision_config, mm_tokens_per_image=4)
    )
    video_width, audio_width = (24, 12) if is_newer else (TEXT_DIM, TEXT_DIM)
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=NUM_TEXT_LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=video_width // 2,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=NUM_REGISTERS,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=audio_width // 2,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=NUM_REGISTERS,
        per_modality_projections=is_newer,
        video_hidden_dim=video_width,
        audio_hidden_dim=audio_width,
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        scaling_factor=0.7,
        encoder_causal=True,
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.5, 2.0, 1.0]))
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8, output_channels=2
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    LTX2Pipeline(
        # As published, but for `shift_terminal`, with which there is no single step.
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=gemma.eval(),
        tokenizer=_tokenizer(),
        connectors=connectors.eval(),
        transformer=make_tiny_transformer(seed, is_newer=is_newer),
        vocoder=vocoder,
    ).save_pretrained(path)
    return path
