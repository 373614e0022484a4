"""Cosmos' text encoder and VAE, called as diffusers' pipelines of Predict2.5 and Predict2 call them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan, Cosmos2_5_PredictBasePipeline, Cosmos2VideoToWorldPipeline
from torch import nn

from .conditioning import Conditioning
from .encoders import Encoders, encode_zero_padded, vae_without_weights
from .pretrained import read_pipeline_class

PIPELINES: dict[str, Any] = {
    kind.__name__: kind for kind in (Cosmos2_5_PredictBasePipeline, Cosmos2VideoToWorldPipeline)
}


class CosmosEncoders(Encoders):
    """See `Encoders`; Predict2.5 reads all layers of Qwen2.5-VL at all positions, Predict2 T5 with zeros at padding."""

    vae_class = AutoencoderKLWan

    @cached_property
    def text_pipeline(self) -> Any:
        """A pipeline of nothing but the text encoder and its tokenizer."""
        vae = vae_without_weights(AutoencoderKLWan, self.directory)
        kind = PIPELINES[read_pipeline_class(self.directory)]
        return self.load_text_pipeline(kind, vae=vae, safety_checker=_NothingToCheck())

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; the mask has all of Predict2.5's positions, which pads before it encodes."""
        return encode_zero_padded(self.text_pipeline, prompts, text_length=self.text_length, device=self.device)


class _NothingToCheck(nn.Module):
    """In the place of the guardrail, without which the pipelines can't be made: encoding captions generates nothing."""
