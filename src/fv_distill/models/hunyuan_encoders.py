"""HunyuanVideo's text encoders and VAE, called as `HunyuanVideoPipeline` calls them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from torch import Tensor

from .conditioning import Conditioning
from .encoders import Encoders


class HunyuanVideoEncoders(Encoders):
    """See `Encoders`; LLaMA's tokens are the text, CLIP's pooled vector is `pooled_text_embedding`."""

    @cached_property
    def text_pipeline(self) -> Any:
        """A `HunyuanVideoPipeline` of nothing but its two text encoders and their tokenizers."""
        pipeline = HunyuanVideoPipeline.from_pretrained(self.directory, transformer=None, vae=None, dtype=self.dtype)
        pipeline.text_encoder.to(self.device)
        pipeline.text_encoder_2.to(self.device)
        return pipeline

    @cached_property
    def vae(self) -> Any:
        """The `AutoencoderKLHunyuanVideo`."""
        kind = AutoencoderKLHunyuanVideo
        return kind.from_pretrained(self.directory, subfolder="vae", dtype=self.dtype).to(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; template, cropping and the choice of a hidden layer are the pipeline's own."""
        text, pooled, mask = self.text_pipeline.encode_prompt(
            list(prompts), max_sequence_length=self.text_length, device=self.device
        )
        mask = mask.bool()
        return Conditioning(text.float() * mask[..., None], mask, {"pooled_text_embedding": pooled.float()})

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
