"""Matrix-Game 2's VAE, which is Wan 2.1's, and its image encoder, a CLIP."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPVisionModel

from .conditioning import Conditioning
from .encoders import Encoders

# CLIP's own (Radford et al. 2021); the published code scales with them.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class MatrixGame2Encoders(Encoders):
    """See `Encoders`; there is no text encoder."""

    @cached_property
    def vae(self) -> Any:
        """The `AutoencoderKLWan`."""
        return AutoencoderKLWan.from_pretrained(self.directory, subfolder="vae", dtype=self.dtype).to(self.device)

    @cached_property
    def image_encoder(self) -> Any:
        """The `CLIPVisionModel`."""
        model = CLIPVisionModel.from_pretrained(self.directory / "image_encoder", dtype=self.dtype)
        return model.to(self.device)  # type: ignore[arg-type]  # its stub knows no torch.device

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """No text, whatever the prompts."""
        return Conditioning(None, None)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """See `Encoders.encode_video`."""
        return self._encode(2 * video - 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Encoders.decode`."""
        video = self.vae.decode(latents.to(self.device, self.vae.dtype), return_dict=False)[0]
        return (video.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        """See `Encoders.encode_images`: what the first frame says, for a clip as long as the video.

        `first_frame_latent` holds normalised latents, as the network reads them and as FastVideo's rows have them.
        """
        first = video[:, :, :1]
        pixels = torch.cat([2 * first - 1, torch.zeros_like(video[:, :, 1:])], dim=2)
        config = self.vae.config
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return {
            "first_frame_latent": (self._encode(pixels) - mean) / std,
            "clip_feature": self._look(first[:, :, 0]),
        }

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode().float()

    def _look(self, images: Tensor) -> Tensor:
        """CLIP's tokens before its last layer of images `[B, 3, H, W]` in [0, 1], fp32.

        The published code squeezes an image into CLIP's square, where diffusers' Wan pipeline crops it.
        """
        size = self.image_encoder.config.image_size
        small = interpolate(images.to(self.device).float(), (size, size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
        scaled = ((small - mean) / std).to(self.image_encoder.dtype)
        return self.image_encoder(scaled, output_hidden_states=True).hidden_states[-2].float()
