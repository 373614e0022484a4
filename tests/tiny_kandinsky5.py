"""A complete Kandinsky 5 pipeline directory with random weights."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from tiny_models import WORDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

TEXT_DIM = 16
POOLED_DIM = 8
LATENT_CHANNELS = 4
FLOW_SHIFT = 5.0
_SYSTEM = "system"


def make_tiny_transformer(seed: int = 0, **changes) -> Kandinsky5Transformer3DModel:
    """One block for text, two for clips; the gates, zero by default, are open."""
    torch.manual_seed(seed)
    config = {
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
    network = Kandinsky5Transformer3DModel(**config | changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.3)
    return network.eval()


def make_tiny_kandinsky5_directory(path: Path, *, seed: int = 0, **changes) -> Path:
    """Save Qwen, CLIP, their tokenizers, VAE (temporal 4, spatial 8), transformer and scheduler as one pipeline."""
    torch.manual_seed(seed)
    vocabulary_size = len(WORDS) + 4
    text_config = {
        "vocab_size": vocabulary_size,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "pad_token_id": 0,
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_DIM,
        "intermediate_size": 16,
    }
    qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config))
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=POOLED_DIM,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.476986,
    )
    pipeline = Kandinsky5T2VPipeline(
        transformer=make_tiny_transformer(seed, **changes),
        vae=vae,
        text_encoder=qwen.eval(),
        tokenizer=_tokenizer(),
        text_encoder_2=clip.eval(),
        tokenizer_2=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    )
    prefix, suffix = pipeline.prompt_template.split("{}")
    system = f"{_SYSTEM} " * pipeline.prompt_template_encode_start_idx
    pipeline.tokenizer = _tokenizer({prefix: system, suffix: ""})
    pipeline.save_pretrained(path)
    return path


def _tokenizer(replaced: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words that first replaces strings, as the template by so many words as it has tokens."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", _SYSTEM, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    steps = [normalizers.Replace(old, new) for old, new in (replaced or {}).items()]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
