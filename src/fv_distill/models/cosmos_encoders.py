"""Cosmos' text encoder and VAE, called as diffusers' pipelines of Predict2.5 and Predict2 call them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan, Cosmos2_5_PredictBasePipeline, Cosmos2VideoToWorldPipeline
from torch import Tensor, nn

from .conditioning import Conditioning
from .encoders import Encoders, vae_without_weights
from .pretrained import read_pipeline_class

PIPELINES: dict[str, Any] = {
    kind.__name__: kind for kind in (Cosmos2_5_PredictBasePipeline, Cosmos2VideoToWorldPipeline)
}


class CosmosEncoders(Encoders):
    """See `Encoders`; Predict2.5 reads all layers of Qwen2.5-VL at all positions, Predict2 T5 with zeros at padding."""

    @cached_property
    def text_pipeline(self) -> Any:
        """A pipeline of nothing but the text encoder and its tokenizer."""
        kind = PIPELINES[read_pipeline_class(self.directory)]
        pipeline = kind.from_pretrained(
            self.directory,
            transformer=None,
            vae=vae_without_weights(AutoencoderKLWan, self.directory),
            safety_checker=_NothingToCheck(),
            dtype=self.dtype,
        )
        pipeline.text_encoder.to(self.device)
        return pipeline

    @cached_property
    def vae(self) -> Any:
        """The `AutoencoderKLWan`."""
        return AutoencoderKLWan.from_pretrained(self.directory, subfolder="vae", dtype=self.dtype).to(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; the mask has all of Predict2.5's positions, which pads before it encodes."""
        text, _ = self.text_pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device
        )
        # Neither pipeline gives a mask; an encoded token is never exactly zero.
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


class _NothingToCheck(nn.Module):
    """In the place of the guardrail, without which the pipelines can't be made: encoding captions generates nothing."""
