"""LongCat-Video's text encoder, UMT5, and its VAE, Wan's."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from .conditioning import Conditioning
from .encoders import Encoders


class LongCatEncoders(Encoders):
    """See `Encoders`; each part is loaded by itself, since the published repository is no pipeline directory."""

    vae_class = AutoencoderKLWan

    @cached_property
    def tokenizer(self) -> Any:
        """The text encoder's."""
        return AutoTokenizer.from_pretrained(self.directory, subfolder="tokenizer")

    @cached_property
    def text_encoder(self) -> Any:
        """The `UMT5EncoderModel`."""
        encoder: Any = UMT5EncoderModel.from_pretrained(self.directory, subfolder="text_encoder", dtype=self.dtype)
        return encoder.to(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`."""
        return encode_text(self.tokenizer, self.text_encoder, prompts, text_length=self.text_length, device=self.device)


def encode_text(
    tokenizer: Any, text_encoder: Any, prompts: Sequence[str], *, text_length: int, device: torch.device
) -> Conditioning:
    """Cleaned, cut or padded to `text_length` tokens and encoded: fp32 and zero at padding, with its mask."""
    tokens = tokenizer(
        [prompt_clean(prompt) for prompt in prompts],
        padding="max_length",
        max_length=text_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(device)
    mask = tokens.attention_mask.bool()
    text = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
    return Conditioning(text * mask[..., None], mask)
