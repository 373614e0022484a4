"""From frames and captions to the tensors of a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fv_distill.models.conditioning import Conditioning
from fv_distill.models.encoders import Encoders
from fv_distill.models.pipeline_index import network_folder
from fv_distill.models.pretrained import load_component_config, read_vae_factors

from .decode import BadClipError

# Above 720p the activations of a whole frame pass what a device of 24 GB has beside the VAE.
TILING_AREA = 1280 * 720


@dataclass(frozen=True)
class Geometry:
    """What clips have to fit.

    Attributes:
        temporal_factor: n in n k + 1 frames, which make k + 1 latent frames.
        multiple: of both sides, in pixels: the VAE's factor times the network's patch.
    """

    temporal_factor: int
    multiple: int

    def check_num_frames(self, num_frames: int) -> None:
        """Raise a ValueError for a number of frames that is no n k + 1, naming the nearest two."""
        over = (num_frames - 1) % self.temporal_factor
        if over:
            below = num_frames - over
            raise ValueError(
                f"num-frames: {num_frames} is not {self.temporal_factor}k+1, which this model's VAE needs; take "
                f"{below} or {below + self.temporal_factor}"
            )


def read_geometry(directory: Path) -> Geometry:
    """The geometry of a pipeline directory.

    Raises:
        FileNotFoundError: if it has no VAE.
        ValueError: if the VAE's config doesn't tell its factors.
    """
    temporal, spatial = read_vae_factors(directory)
    return Geometry(temporal, spatial * _patch(directory))


def _patch(directory: Path) -> int:
    """The side of the network's patches in latent pixels; 1 where encoders are all that a directory holds."""
    folder = network_folder(directory)
    if not (directory / folder / "config.json").is_file():
        return 1
    size = load_component_config(directory, folder).get("patch_size", 1)
    # HunyuanVideo and LTX-2 have the temporal size apart; the others give time, height and width.
    return int(size if isinstance(size, int) else max(size[1:]))


def encode_captions(encoders: Encoders, captions: Sequence[str], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """What each caption's row stores: the embedding without padding, and what else the family makes of text.

    Args:
        encoders: of the family.
        captions: together one batch.
        dtype: that floating tensors are stored in.

    Raises:
        ValueError: for encoders that make no text embedding though they read text.
    """
    encoded = encoders.encode_prompts(captions)
    return [_text_row(encoders, encoded.row(index), dtype) for index in range(len(captions))]


def encode_clip_caption(encoders: Encoders, caption: str, frames: np.ndarray, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a row stores of a caption that is read with the clip's first frame; see `Encoders.text_reads_image`.

    Args:
        encoders: of the family.
        caption: the clip's.
        frames: uint8 `[F, H, W, 3]`, of which the first is looked at.
        dtype: that floating tensors are stored in.
    """
    return _text_row(encoders, encoders.encode_clip_captions([caption], _video(frames[:1], encoders)), dtype)


def encode_clip(encoders: Encoders, frames: np.ndarray, dtype: torch.dtype) -> dict[str, Tensor]:
    """The raw latents of a clip, and the image conditions of families that have some.

    Args:
        encoders: of the family.
        frames: uint8 `[F, H, W, 3]`.
        dtype: that floating tensors are stored in.

    Raises:
        BadClipError: if what comes out is not finite.
    """
    video = _video(frames, encoders)
    encoded = {"vae_latent": encoders.encode_video(video), **encoders.encode_images(video)}
    row = {name: _stored(value[0], dtype) for name, value in encoded.items()}
    bad = [name for name, value in row.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise BadClipError("not finite", f"{', '.join(bad)}: the VAE overflows; try --vae-dtype float32")
    return row


def _video(frames: np.ndarray, encoders: Encoders) -> Tensor:
    # As bytes to the device, where a float takes four times the room.
    pixels = torch.from_numpy(frames).to(encoders.device, non_blocking=True)
    return pixels.permute(3, 0, 1, 2)[None].float() / 255


def _text_row(encoders: Encoders, encoded: Conditioning, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a conditioning of batch size 1."""
    if encoded.text is None:
        raise ValueError(f"{type(encoders).__name__} makes no text embedding; its reads_text has to be False")
    text = encoded.text[0]
    if encoded.text_mask is not None:
        text = text[encoded.text_mask[0].to(text.device)]
    row = {"text_embedding": text, **{name: value[0] for name, value in encoded.extras.items()}}
    return {name: _stored(value, dtype) for name, value in row.items()}


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value.to(dtype) if value.is_floating_point() else value).cpu()
