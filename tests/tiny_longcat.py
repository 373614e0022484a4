"""A LongCat-Video with random weights, laid out as it is published or as a pipeline directory."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import LATENT_CHANNELS, TEXT_DIM, _text_encoder, _tokenizer, make_tiny_vae

from fv_distill.models.pipelines import LongCatVideoPipeline
from fv_distill.models.transformers import LongCatVideoTransformer3DModel


def make_tiny_network(seed: int = 0, **changes) -> LongCatVideoTransformer3DModel:
    """Two blocks, two heads; torch's own random weights leave no gate closed."""
    torch.manual_seed(seed)
    config = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "caption_channels": TEXT_DIM,
        "adaln_tembed_dim": 16,
        "frequency_embedding_size": 32,
        "text_tokens_zero_pad": True,
    }
    network = LongCatVideoTransformer3DModel(**config | changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            # So that the tiny text counts for as much as it does in a trained network.
            elif "y_proj" in name:
                parameter.mul_(3)
    return network.eval()


def make_tiny_longcat_directory(path: Path, *, published: bool = False, seed: int = 0) -> Path:
    """Save a pipeline directory, or with `published` the folders of meituan-longcat/LongCat-Video, without an index."""
    torch.manual_seed(seed)
    vae = make_tiny_vae()
    pipeline = LongCatVideoPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_text_encoder(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=12.0),
        transformer=make_tiny_network(seed),
    )
    pipeline.save_pretrained(path)
    if published:
        (path / "model_index.json").unlink()
        (path / "transformer").rename(path / "dit")
        (path / "lora").mkdir()
        (path / "lora" / "cfg_step_lora.safetensors").write_bytes(b"")
        assert json.loads((path / "dit/config.json").read_text())["_class_name"] == "LongCatVideoTransformer3DModel"
    return path
