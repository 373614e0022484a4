"""Wan's VAE decoder, frame by frame: its convolutions are causal in time, so that what is decoded never changes."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from .base import ModelBase


class WanStreamingDecoder:
    """Decodes a clip in pieces, with the same result as the VAE's own `decode` of the whole.

    The VAE decodes one latent frame after the other as well, and carries what its convolutions need of the past in a
    list that it empties after each clip; here the list lives as long as the decoder. One decoder serves one clip.

    Raises:
        RuntimeError: if this release of diffusers keeps that state elsewhere.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        counts: Any = getattr(vae, "_cached_conv_counts", None)
        if not isinstance(counts, dict) or "decoder" not in counts:
            raise RuntimeError(
                "this release of diffusers keeps AutoencoderKLWan's decoding state elsewhere than 0.42 does; decode "
                "whole clips instead, or install the release that setup.py names"
            )
        self._vae: Any = vae
        self._past: list[Any] = [None] * counts["decoder"]
        self._num_frames = 0

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The video of the next latent frames.

        Args:
            latents: raw (not normalised) latents `[B, C, t, H, W]` that follow those of the last call.

        Returns:
            `[B, 3, f, 8 H, 8 W]` in [-1, 1] (for Wan 2.1's VAE): the clip's first latent frame is one frame of video,
            every later one four.
        """
        vae = self._vae
        latents = vae.post_quant_conv(latents)
        frames = []
        for frame in latents.split(1, dim=2):
            first = {"first_chunk": True} if self._num_frames == 0 else {}
            frames.append(vae.decoder(frame, feat_cache=self._past, feat_idx=[0], **first))
            self._num_frames += 1
        video = torch.cat(frames, dim=2)
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1, 1)


def streaming_decoder(model: ModelBase) -> Callable[[Tensor], Tensor]:
    """See `CausalModelBase.streaming_decoder`, for the families whose VAE is Wan's."""
    vae = model.encoders().vae
    decoder = WanStreamingDecoder(vae)
    return lambda chunk: (decoder(model.raw_latents(chunk).to(vae.dtype)).float() / 2 + 0.5).clamp(0, 1)
