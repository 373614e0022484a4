"""Clips side by side, as videos and as a sheet of frames."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fv_distill.callbacks.video_files import enlarge, preview

_SMALLEST_SIDE = 128
_LARGEST_SIDE = 480
_GAP = 4
_LABEL_HEIGHT = 20
_FONT_SIZE = 12
_SHEET_FRAMES = 6
_SHEET_SIDE = 128
_SHEET_LABEL_WIDTH = 150
_PAPER, _INK = (250, 250, 250), (30, 30, 30)


def side_by_side(clips: Mapping[str, np.ndarray]) -> np.ndarray:
    """Clips uint8 `[F, H, W, 3]` next to each other, their names above; all get the size of the first.

    Shorter clips stand still at their end.
    """
    length = max(len(clip) for clip in clips.values())
    tiles = [_fit(_hold(clip, length), like=next(iter(clips.values()))) for clip in clips.values()]
    height, width = tiles[0].shape[1:3]
    bar = np.asarray(_labels(list(clips), width))
    total = len(tiles) * (width + _GAP) - _GAP
    video = np.full((length, _LABEL_HEIGHT + height, total + total % 2, 3), _PAPER, dtype=np.uint8)
    video[:, :_LABEL_HEIGHT, :total] = bar
    for column, tile in enumerate(tiles):
        left = column * (width + _GAP)
        video[:, _LABEL_HEIGHT:, left : left + width] = tile
    return video


def contact_sheet(rows: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> Image.Image:
    """Under each prompt a line of frames per way, with its name at the left.

    Args:
        rows: prompts with their clips, uint8 `[F, H, W, 3]`.
    """
    strips = [(prompt, {name: _strip(clip) for name, clip in clips.items()}) for prompt, clips in rows]
    widths = [len(clip) * (clip.shape[2] + _GAP) for _, clips in strips for clip in clips.values()]
    heights = [_LABEL_HEIGHT + sum(clip.shape[1] + _GAP for clip in clips.values()) + 2 * _GAP for _, clips in strips]
    sheet = Image.new("RGB", (_SHEET_LABEL_WIDTH + max(widths) + _GAP, sum(heights)), _PAPER)
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE), 0
    for prompt, clips in strips:
        draw.text((_GAP, top + 2), _cut(prompt, font, sheet.width - 2 * _GAP), fill=_INK, font=font)
        top += _LABEL_HEIGHT
        for name, clip in clips.items():
            label = _cut(name, font, _SHEET_LABEL_WIDTH - 3 * _GAP)
            draw.text((2 * _GAP, top + clip.shape[1] // 2 - 8), label, fill=_INK, font=font)
            for column, frame in enumerate(clip):
                sheet.paste(Image.fromarray(frame), (_SHEET_LABEL_WIDTH + column * (clip.shape[2] + _GAP), top))
            top += clip.shape[1] + _GAP
        top += 2 * _GAP
    return sheet


def _strip(frames: np.ndarray) -> np.ndarray:
    return preview(enlarge(frames), max_frames=_SHEET_FRAMES, max_side=_SHEET_SIDE)


def _fit(frames: np.ndarray, *, like: np.ndarray) -> np.ndarray:
    """The size of `like`, small ones enlarged by a whole factor and large ones scaled down, with even sides."""
    height, width = like.shape[1:3]
    factor: float = max(1, -(-_SMALLEST_SIDE // min(height, width)))
    if max(height, width) > _LARGEST_SIDE:
        factor = _LARGEST_SIDE / max(height, width)
    size = (round(width * factor / 2) * 2, round(height * factor / 2) * 2)
    # Enlarged pixels stay pixels.
    kind = Image.Resampling.NEAREST if factor >= 1 and frames.shape == like.shape else Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, kind)) for frame in frames])


def _hold(frames: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([frames, frames[-1:].repeat(length - len(frames), axis=0)])


def _labels(names: Sequence[str], width: int) -> Image.Image:
    total = len(names) * (width + _GAP) - _GAP
    bar = Image.new("RGB", (total, _LABEL_HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(_FONT_SIZE)
    for column, name in enumerate(names):
        draw.text((column * (width + _GAP) + 2, 2), _cut(name, font, width - 4), fill=_INK, font=font)
    return bar


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
