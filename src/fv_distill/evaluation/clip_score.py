"""The optional CLIP score: how well frames and prompt go together (Hessel et al. 2021, without their factor 2.5)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

_FRAMES = 8


class ClipScorer:
    """`100 max(0, cos(image, text))` by a CLIP model, the mean over up to 8 evenly spaced frames.

    Args:
        model: a local directory or a Hub id of a `CLIPModel`; nothing else of this package downloads anything.
        device: where it runs, from its first use on: clips are made before.

    Raises:
        FileNotFoundError: if there is no such model.
    """

    def __init__(self, model: str | Path, *, device: torch.device) -> None:
        self._device = device
        try:
            self._model: Any = CLIPModel.from_pretrained(model).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._images = AutoImageProcessor.from_pretrained(model)
        except OSError as error:
            raise FileNotFoundError(f"clip_score={str(model)!r}: no CLIP model could be loaded ({error})") from error

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> float:
        """The score of one clip, uint8 `[F, H, W, 3]`."""
        places = np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)
        images = self._images([Image.fromarray(frames[place]) for place in places], return_tensors="pt")
        text = self._tokenizer([prompt], truncation=True, return_tensors="pt")
        device = self._device
        out = self._model.to(device)(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=images["pixel_values"].to(device),
        )
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return float(100 * cosine.clamp(min=0).mean())
