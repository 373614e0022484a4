"""The first latent frames of a clip, for networks that are given these and generate the others."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

COLUMN = "first_frame_latent"


def read_given_frames(batch: Mapping[str, Any], count: int, *, key: str) -> Tensor:
    """Raw latents `[B, C, count, H, W]` of a collated batch: of its clips, or of rows without clips from `COLUMN`.

    Args:
        batch: as the data loader makes it.
        count: how many frames.
        key: what asks for them, for the message.

    Raises:
        ValueError: if the rows have neither.
    """
    if "vae_latent" in batch:
        return batch["vae_latent"][:, :, :count]
    if COLUMN in batch and batch[COLUMN].shape[2] == count:
        return batch[COLUMN]
    raise ValueError(f"{key}, but the rows hold neither clips nor a {COLUMN} of {count} latent frames")
