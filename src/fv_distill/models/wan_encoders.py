"""Wan's text encoder and VAE, called as `WanPipeline` calls them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel

from .conditioning import Conditioning
from .encoders import Encoders, encode_zero_padded
from .pipeline_index import read_index
from .pretrained import load_component_config, read_latent_statistics


class WanEncoders(Encoders):
    """See `Encoders`; Wan's text is padded with zeros."""

    vae_class = AutoencoderKLWan

    @cached_property
    def text_pipeline(self) -> Any:
        """A `WanPipeline` of nothing but the text encoder and its tokenizer."""
        # An image-to-video directory's further components are no part of this pipeline, and stay where they are.
        return self.load_text_pipeline(WanPipeline, transformer_2=None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `Encoders.encode_prompts`; cleaning, tokenising and padding are `WanPipeline`'s own."""
        return encode_zero_padded(self.text_pipeline, prompts, text_length=self.text_length, device=self.device)


class WanImageEncoders(WanEncoders):
    """See `Encoders`; with what `WanImageToVideoPipeline` makes of the first frame."""

    @cached_property
    def index(self) -> dict[str, Any]:
        """The directory's `model_index.json`."""
        return read_index(self.directory)

    @cached_property
    def image_encoder(self) -> Any:
        """The `CLIPVisionModel`, in float32, as the pipeline's documentation has it."""
        encoder: Any = CLIPVisionModel.from_pretrained(self.directory, subfolder="image_encoder", dtype=torch.float32)
        return encoder.to(self.device).eval()

    @cached_property
    def image_processor(self) -> Any:
        """What scales, crops and normalises images for it."""
        # Importing it has transformers say which backend it falls back to, which is of no interest without images.
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor.from_pretrained(self.directory, subfolder="image_processor")

    @torch.no_grad()
    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        """See `Encoders.encode_images`.

        Returns:
            `first_frame_latent`, normalised (see `WanImageToVideoModel`): `[B, C, T, h, w]` of the first frame and grey
            after it, for TI2V 5B `[B, C, 1, h, w]` of the frame alone. For Wan 2.1 also `clip_feature` `[B, N, D]`.
        """
        pixels = 2 * video.to(self.device, self.vae.dtype) - 1
        if self.index.get("expand_timesteps"):
            pixels = pixels[:, :, :1]
        else:
            pixels = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], dim=2)
        raw = self.vae.encode(pixels).latent_dist.mode().float()
        features = {"first_frame_latent": self._normalized(raw)}
        if load_component_config(self.directory, "transformer").get("image_dim") is not None:
            features["clip_feature"] = self._clip_features(video[:, :, 0])
        return features

    def _normalized(self, raw: Tensor) -> Tensor:
        mean, std = (value.to(raw.device) for value in read_latent_statistics(self.directory))
        return (raw - mean) / std

    def _clip_features(self, frames: Tensor) -> Tensor:
        """Of frames `[B, 3, H, W]`, the states before the last layer, as the pipeline takes them."""
        pixels = (frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        images = self.image_processor(images=[Image.fromarray(frame) for frame in pixels], return_tensors="pt")
        states = self.image_encoder(images["pixel_values"].to(self.device), output_hidden_states=True).hidden_states
        return states[-2].float()
