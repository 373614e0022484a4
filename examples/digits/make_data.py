"""Write the digits as training rows: clips with captions, and captions alone.

    python examples/digits/make_data.py --teacher examples/digits/teacher --output examples/digits/data

`clips/` trains a model from data (fine-tuning, DMD2's data_latent mode); `prompts/` is all that DMD2 needs to simulate.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from wan_directory import encode_captions

from fv_distill.data import write_rows
from fv_distill.data.digits import CANVAS, CAPTIONS, FPS, NUM_FRAMES, sample_clips, to_latents


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=here / "teacher", help="whose text encoder is used")
    parser.add_argument("--output", type=Path, default=here / "data")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    embeddings = encode_captions(args.teacher, list(CAPTIONS))
    text = [embedding[embedding.abs().sum(-1) > 0].half() for embedding in embeddings]
    write_rows(args.output / "prompts" / "prompts.parquet", prompt_rows(text))
    write_rows(args.output / "clips" / "clips.parquet", clip_rows(text, args.clips, args.seed))


def prompt_rows(text: list[torch.Tensor]) -> Iterator[dict[str, Any]]:
    """One text-only row per caption."""
    for index, caption in enumerate(CAPTIONS):
        yield {"id": f"prompt-{index:02d}", "caption": caption, "text_embedding": text[index]}


def clip_rows(text: list[torch.Tensor], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Clips of the training split; the latents' 17 grey levels are exact in fp16."""
    batch = sample_clips("train", count, torch.Generator().manual_seed(seed))
    for index, (latent, caption) in enumerate(zip(to_latents(batch.clips), batch.captions.tolist(), strict=True)):
        yield {
            "id": f"clip-{index:05d}",
            "file_name": f"clip-{index:05d}.mp4",
            "caption": CAPTIONS[caption],
            "media_type": "video",
            "width": CANVAS,
            "height": CANVAS,
            "num_frames": NUM_FRAMES,
            "duration_sec": NUM_FRAMES / FPS,
            "fps": float(FPS),
            "vae_latent": latent.half(),
            "text_embedding": text[caption],
        }


if __name__ == "__main__":
    main()
