"""Complete Cosmos pipeline directories with random weights, small enough to be made in every test session."""

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from tiny_hunyuan import make_tiny_chat_tokenizer, make_tiny_tokenizer
from tiny_models import LATENT_CHANNELS, WORDS, make_tiny_vae
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, T5Config, T5EncoderModel

# Two layers of width 16 side by side.
TEXT_DIM = 32
T5_DIM = 16


# torchvision, which diffusers' network resizes its padding mask with, has no build for every torch; its `resize` of a
# tensor to the nearest pixels is this.
if not hasattr(transformer_cosmos, "transforms"):

    def _resize(image, size, interpolation):
        return torch.nn.functional.interpolate(image, size=size, mode=interpolation)

    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )


class PassingChecker(torch.nn.Module):
    """In the place of the guardrail, which is a package and weights of its own."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        """Everything is fine."""
        return True

    def check_video_safety(self, video):
        """As it is."""
        return video


def make_tiny_cosmos_transformer(seed: int = 0, **config: object) -> CosmosTransformer3DModel:
    """Two blocks, two heads; the condition mask is a channel of the input."""
    torch.manual_seed(seed)
    sizes = {
        "in_channels": LATENT_CHANNELS + 1,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (8, 16, 16),
        "patch_size": (1, 2, 2),
        "rope_scale": (1.0, 3.0, 3.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": TEXT_DIM,
        "encoder_hidden_states_channels": 16,
    }
    return CosmosTransformer3DModel(**{**sizes, **config})


def make_tiny_qwen() -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of width 16."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(WORDS) + 4,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_tiny_cosmos_directory(path: Path, *, seed: int = 0) -> Path:
    """Predict2.5: tokenizer, Qwen2.5-VL, Wan's VAE, transformer and the published scheduler as one pipeline."""
    torch.manual_seed(seed)
    Cosmos2_5_PredictBasePipeline(
        text_encoder=make_tiny_qwen(),
        tokenizer=make_tiny_chat_tokenizer(num_system_tokens=1),
        vae=make_tiny_vae(),
        scheduler=UniPCMultistepScheduler(
            use_karras_sigmas=True,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            sigma_max=200.0,
            sigma_min=0.01,
        ),
        transformer=make_tiny_cosmos_transformer(seed),
        safety_checker=PassingChecker(),
    ).save_pretrained(path)
    return path


def make_tiny_cosmos2_directory(path: Path, *, seed: int = 0) -> Path:
    """Predict2 Video2World: the same with T5, and EDM's noise levels in the scheduler."""
    torch.manual_seed(seed)
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS) + 4, d_model=T5_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    Cosmos2VideoToWorldPipeline(
        text_encoder=t5.eval(),
        tokenizer=make_tiny_tokenizer({}),
        vae=make_tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        transformer=make_tiny_cosmos_transformer(seed, use_crossattn_projection=False),
        safety_checker=PassingChecker(),
    ).save_pretrained(path)
    return path
