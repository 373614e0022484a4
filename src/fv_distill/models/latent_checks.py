"""Whether a clip's latents and text fit a network and a VAE, in one message for every family."""

from collections.abc import Sequence
from pathlib import Path


def check_clip_shape(
    shape: Sequence[int],
    *,
    channels: int,
    patch_size: Sequence[int],
    temporal_factor: int,
    num_frames: int | None,
    directory: Path,
) -> None:
    """Check latents `[C, T, H, W]`.

    Args:
        shape: of the latents.
        channels: that the network generates.
        patch_size: of the network along T, H and W.
        temporal_factor: frames per latent frame of the VAE, whose clips have 4k + 1 frames if it is 4.
        num_frames: of the clip that the latents were made of; None if it is not known.
        directory: of the model, for the message.

    Raises:
        ValueError: naming the fix.
    """
    shown = tuple(shape)
    if len(shown) != 4:
        raise ValueError(f"latents have shape {shown}; expected [C, T, H, W]")
    if shown[0] != channels:
        raise ValueError(
            f"latents {shown} have {shown[0]} channels but {directory} takes {channels}; encode the data with this "
            "model's own VAE"
        )
    for name, size, patch in zip(("T", "H", "W"), shown[1:], patch_size, strict=True):
        if size < patch or size % patch:
            raise ValueError(f"latents {shown}: {name}={size} does not divide by the patch size {patch}; crop the data")
    frames = (shown[1] - 1) * temporal_factor + 1
    if num_frames is not None and num_frames != frames:
        raise ValueError(
            f"a clip of {num_frames} frames can't have {shown[1]} latent frames: this VAE turns {temporal_factor}k+1 "
            f"frames into k+1, so {shown[1]} latent frames are {frames} frames; re-encode the clip"
        )


def check_text_width(shape: Sequence[int], width: int, *, key: str, directory: Path) -> None:
    """Raise a `ValueError` unless text embeddings `[L, D]` have the width that the network's config has as `key`."""
    if shape[-1] != width:
        raise ValueError(
            f"text embeddings of shape {tuple(shape)} don't fit {directory}, whose {key} is {width}; encode the "
            "captions with this model's own text encoder"
        )
