"""LTX-2's text encoder with its connectors, and its VAE, called as `LTX2Pipeline` calls them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Video, LTX2Pipeline
from safetensors import safe_open
from torch import Tensor

from .conditioning import Conditioning
from .encoders import Encoders
from .pretrained import load_component_config


class LTX2Encoders(Encoders):
    """See `Encoders`; the text is what the connectors make of Gemma's layers, with registers in place of padding."""

    vae_class = AutoencoderKLLTX2Video

    @cached_property
    def text_pipeline(self) -> Any:
        """An `LTX2Pipeline` of nothing but the text encoder, its tokenizer and the connectors."""
        return self.load_text_pipeline(LTX2Pipeline, audio_vae=None, vocoder=None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; the connectors fill what is left of `text_length` with learned registers."""
        pipeline = self.text_pipeline
        states, mask, _, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        text, _, mask = pipeline.connectors(states, mask, padding_side=pipeline.tokenizer.padding_side)
        return Conditioning(text.float(), mask.bool())


def read_statistics(directory: Path) -> tuple[Tensor, Tensor]:
    """The per-channel mean and scaled deviation of latents `[1, C, 1, 1, 1]`; the VAE has them among its weights."""
    config = load_component_config(directory, "vae")
    channels = int(config["latent_channels"])
    found = {"latents_mean": torch.zeros(channels), "latents_std": torch.ones(channels)}
    # An estimate, on the meta device, has configs without weights.
    if torch.get_default_device().type != "meta":
        for file in sorted((directory / "vae").glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                present = set(weights.keys()) & found.keys()
                found |= {name: weights.get_tensor(name).float() for name in present}
    mean, std = (found[name].view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std / float(config.get("scaling_factor", 1.0))
