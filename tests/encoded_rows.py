"""Training rows as a family's own encoders make them."""

from pathlib import Path

import torch

from fv_distill.data import write_rows
from fv_distill.models.base import ModelBase

CAPTIONS = ("a digit", "the digit moving left", 'a handwritten digit "3"', "a digit up", "left", "two")


def write_encoded_rows(directory: Path, model: ModelBase, *, num_frames: int = 9) -> Path:
    """Clips of noise of 32 x 32, one for each caption, with all that the model's encoders make of it."""
    encoders = model.encoders()
    video = torch.rand(len(CAPTIONS), 3, num_frames, 32, 32, generator=torch.Generator().manual_seed(0))
    latents, text = encoders.encode_video(video), encoders.encode_clip_captions(CAPTIONS, video)
    columns = {**text.extras, **encoders.encode_images(video)}
    assert text.text is not None and text.text_mask is not None
    rows = [
        {
            "caption": caption,
            "num_frames": num_frames,
            "vae_latent": latents[index],
            "text_embedding": text.text[index][text.text_mask[index]],
            **{name: value[index] for name, value in columns.items()},
        }
        for index, caption in enumerate(CAPTIONS)
    ]
    write_rows(directory / "rows.parquet", rows)
    return directory
