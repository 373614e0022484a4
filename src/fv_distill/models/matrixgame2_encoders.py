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
from .wan_vae import encode_normalized, encode_pixels

# CLIP's own (Radford et al. 2021); the published code scales with them.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class MatrixGame2Encoders(Encoders):
    """See `Encoders`; there is no text encoder."""

    reads_text = False
    vae_class = AutoencoderKLWan

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
        return encode_pixels(self.vae, (2 * video - 1).to(self.device))

    @torch.no_grad()
    def encode_images(self, video: Tensor) -> dict[str, Tensor]:
        """See `Encoders.encode_images`: what the first frame says, for a clip as long as the video."""
        return first_frame_conditions(self.vae, self.image_encoder, video.to(self.device))


@torch.no_grad()
def first_frame_conditions(vae: Any, image_encoder: Any, video: Tensor) -> dict[str, Tensor]:
    """What the network reads of a first frame, by data column.

    Args:
        vae: an `AutoencoderKLWan`.
        image_encoder: a `CLIPVisionModel`.
        video: `[B, 3, F, H, W]` in [0, 1]; only the first frame is looked at.

    Returns:
        `first_frame_latent` `[B, C, T, h, w]`, *normalised*, as the network reads it and FastVideo's rows have it: of
        the first frame and grey after it. `clip_feature` `[B, N, D]`: CLIP's tokens before its last layer. The
        published code squeezes an image into CLIP's square, where diffusers' Wan pipeline crops it.
    """
    first = video[:, :, :1]
    latents = encode_normalized(vae, torch.cat([2 * first - 1, torch.zeros_like(video[:, :, 1:])], dim=2))
    size = image_encoder.config.image_size
    small = interpolate(first[:, :, 0].float(), (size, size), mode="bicubic", align_corners=False)
    clip_mean, clip_std = (torch.tensor(of, device=small.device).view(1, 3, 1, 1) for of in (_CLIP_MEAN, _CLIP_STD))
    pixels = ((small - clip_mean) / clip_std).to(image_encoder.dtype)
    tokens = image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
    return {"first_frame_latent": latents, "clip_feature": tokens.float()}
