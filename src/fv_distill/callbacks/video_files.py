"""Clips as files that a person can look at: mp4 or gif, and a contact sheet of many."""

import importlib.util
import io
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

_SMALLEST_SIDE = 64
_MARGIN = 4
_FONT_SIZE = 14
_LINE_HEIGHT = 18
_MAX_CAPTION_LINES = 3
# Narrower sheets would break every caption after two words.
_SMALLEST_SHEET_WIDTH = 360


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
    write_video_stream(path, [frames], fps=fps)


def write_video_stream(path: str | Path, chunks: Iterable[np.ndarray], *, fps: float) -> None:
    """The same for frames that come in pieces; an .mp4 is encoded as they come, a .gif when all are there."""
    path = Path(path)
    check_video_path(path)
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        if path.suffix == ".gif":
            partial.write_bytes(encode_gif(np.concatenate([_checked(chunk) for chunk in chunks]), fps=fps))
        else:
            _write_mp4(partial, (enlarge(_checked(chunk)) for chunk in chunks), fps=fps)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_video_path(path: Path) -> None:
    """Raise what writing `path` would raise, before there is anything to write."""
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path}: a video is written as .mp4 or .gif")
    if path.suffix == ".mp4" and importlib.util.find_spec("av") is None:
        raise ImportError("mp4 files need PyAV: pip install 'fv_distill[video]', or write .gif")


def _checked(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 [F, H, W, 3]")
    return frames


def encode_gif(frames: np.ndarray, *, fps: float) -> bytes:
    """An endless animated GIF of uint8 frames `[F, H, W, 3]`; tiny ones are enlarged."""
    images = [Image.fromarray(frame) for frame in enlarge(frames)]
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, disposal=1)
    return buffer.getvalue()


def enlarge(frames: np.ndarray) -> np.ndarray:
    """Repeat the pixels of small clips `[F, H, W, 3]` until the shorter side has 64."""
    factor = -(-_SMALLEST_SIDE // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else frames


def preview(frames: np.ndarray, *, max_frames: int, max_side: int = 192) -> np.ndarray:
    """A clip small enough to send between processes and to log: evenly spaced frames, the first and last among them.

    Args:
        frames: uint8 `[F, H, W, 3]`.
        max_frames: how many to keep at most.
        max_side: longer sides are scaled down to it.
    """
    count = min(max_frames, len(frames))
    frames = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    height, width = frames.shape[1:3]
    scale = max_side / max(height, width)
    if scale >= 1:
        return frames
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def contact_sheet(videos: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """One row of frames per clip under its caption, which is wrapped and cut after three lines.

    Args:
        videos: uint8 `[F, H, W, 3]`, all of one size, few frames each (see `preview`).
        captions: one per clip.
    """
    videos = [enlarge(video) for video in videos]
    num_frames, height, width = videos[0].shape[:3]
    sheet_width = max(num_frames * (width + _MARGIN) + _MARGIN, _SMALLEST_SHEET_WIDTH)
    font = ImageFont.load_default(_FONT_SIZE)
    texts = [_wrap(caption, font, sheet_width - 2 * _MARGIN) for caption in captions]
    row_heights = [len(lines) * _LINE_HEIGHT + height + 2 * _MARGIN for lines in texts]
    sheet = Image.new("RGB", (sheet_width, sum(row_heights) + _MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for video, lines, row_height in zip(videos, texts, row_heights, strict=True):
        for position, line in enumerate(lines):
            draw.text((_MARGIN, top + position * _LINE_HEIGHT), line, fill="black", font=font)
        for column, frame in enumerate(video):
            place = (_MARGIN + column * (width + _MARGIN), top + len(lines) * _LINE_HEIGHT)
            sheet.paste(Image.fromarray(frame), place)
        top += row_height
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Lines of whole words that fit `width` pixels; a word too long for a line is cut off."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _MAX_CAPTION_LINES:
        lines = [*lines[: _MAX_CAPTION_LINES - 1], f"{lines[_MAX_CAPTION_LINES - 1]} ..."]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" ...")
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."


def _write_mp4(path: Path, chunks: Iterable[np.ndarray], *, fps: float) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        for frames in chunks:
            # H.264 in yuv420p needs even sides.
            frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def load_first_frame(path: Path, width: int | None, height: int | None) -> Image.Image:
    """An image in the size of the clips, as training clips are made: scaled to cover it, and cut in the middle.

    Without a size it stays as it is: the pipeline then takes the clip's from it.

    Raises:
        ValueError: for a file that is no image.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
            if width is None or height is None:
                return picture
            return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow can read") from error
