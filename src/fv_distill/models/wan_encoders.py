"""Wan's text encoder and VAE, called as `WanPipeline` calls them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

from .conditioning import Conditioning
from .encoders import Encoders


class WanEncoders(Encoders):
    """See `Encoders`; Wan's text is padded with zeros."""

    @cached_property
    def text_pipeline(self) -> Any:
        """A `WanPipeline` of nothing but the text encoder and its tokenizer."""
        pipeline = WanPipeline.from_pretrained(self.directory, transformer=None, vae=None, dtype=self.dtype)
        pipeline.text_encoder.to(self.device)
        return pipeline

    @cached_property
    def vae(self) -> Any:
        """The `AutoencoderKLWan`."""
        return AutoencoderKLWan.from_pretrained(self.directory, subfolder="vae", dtype=self.dtype).to(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; cleaning, tokenising and padding are `WanPipeline`'s own."""
        text, _ = self.text_pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device
        )
        # The pipeline pads with zeros and gives no mask; an encoded token is never exactly zero.
        return Conditioning(text.float(), text.abs().sum(dim=-1) > 0)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """See `Encoders.encode_video`."""
        pixels = 2 * video.to(self.device, self.vae.dtype) - 1
        return self.vae.encode(pixels).latent_dist.mode().float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Encoders.decode`."""
        video = self.vae.decode(latents.to(self.device, self.vae.dtype), return_dict=False)[0]
        return (video.float() / 2 + 0.5).clamp(0, 1)
