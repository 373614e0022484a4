"""Clips as files that a person can look at: mp4 or gif, and a contact sheet of many."""

import importlib.util
import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST_SIDE = 64
_MARGIN = 4
_CAPTION_HEIGHT = 16


def best_suffix() -> str:
    """ ".mp4" where PyAV is installed (`pip install fv_distill[video]`), else ".gif"."""
    return ".mp4" if importlib.util.find_spec("av") else ".gif"


def write_video(path: str | Path, frames: np.ndarray, *, fps: float) -> None:
    """Write uint8 frames `[F, H, W, 3]` as .mp4 (PyAV) or .gif (Pillow); tiny clips are enlarged by whole factors.

    The file appears under its name when it is complete.

    Raises:
        ValueError: for another suffix or array.
        ImportError: for .mp4 without PyAV.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 [F, H, W, 3]")
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    if path.suffix == ".gif":
        partial.write_bytes(encode_gif(frames, fps=fps))
    elif path.suffix == ".mp4":
        _write_mp4(partial, enlarge(frames), fps=fps)
    else:
        raise ValueError(f"{path}: a video is written as .mp4 or .gif")
    os.replace(partial, path)


def encode_gif(frames: np.ndarray, *, fps: float) -> bytes:
    """An endless animated GIF of uint8 frames `[F, H, W, 3]`."""
    images = [Image.fromarray(frame) for frame in enlarge(frames)]
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, disposal=1)
    return buffer.getvalue()


def enlarge(frames: np.ndarray) -> np.ndarray:
    """Repeat the pixels of small clips until the shorter side has 64."""
    factor = -(-_SMALLEST_SIDE // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else frames


def contact_sheet(videos: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """One row of frames per clip under its caption; clips are uint8 `[F, H, W, 3]` of one size."""
    videos = [enlarge(video) for video in videos]
    num_frames, height, width = videos[0].shape[:3]
    font = ImageFont.load_default()
    row_height = _CAPTION_HEIGHT + height + _MARGIN
    text_width = max(int(font.getlength(caption)) for caption in captions)
    sheet_width = max(num_frames * (width + _MARGIN), text_width) + _MARGIN
    sheet = Image.new("RGB", (sheet_width, len(videos) * row_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = _MARGIN + row * row_height
        draw.text((_MARGIN, top), caption, fill="black", font=font)
        for column, frame in enumerate(video):
            sheet.paste(Image.fromarray(frame), (_MARGIN + column * (width + _MARGIN), top + _CAPTION_HEIGHT))
    return sheet


def _write_mp4(path: Path, frames: np.ndarray, *, fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError("mp4 files need PyAV: pip install 'fv_distill[video]', or write .gif") from error
    # H.264 in yuv420p needs even sides.
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
