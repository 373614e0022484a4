"""Frames out of video files, with PyAV, and out of folders of pictures, with Pillow.

Whatever is wrong with a file ends in a `BadClipError`. All is decoded in one pass that keeps no more than the frames
asked for, already at their final size.
"""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image, ImageOps

from .buckets import Size, choose_bucket
from .fitting import display_size, fit_frame

Media = Path | bytes | tuple[Path, ...]
"""A video file, a video in memory, or the pictures of a clip in their order."""

# 8K has 33 million pixels; a damaged header can promise any number.
_MAX_PIXELS = 2**26
_DECODER_THREADS = 2
# Decoding up to a window's start costs less than seeking and opening again if it is only this far away.
_SEEK_SECONDS = 2.0


class BadClipError(ValueError):
    """A clip that no row can be made of.

    Attributes:
        reason: a few words, the same for all clips with this trouble.
        detail: what is so in this clip.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ClipFormat:
    """What clips are brought to.

    Attributes:
        num_frames: frames of a clip.
        fps: frames per second that are resampled to; None takes frames as they come.
        sizes: the clip gets the one with the nearest aspect ratio.
        crop: cut the sides, or fill with black.
        clips_per_video: see `plan_windows`.
        timeout: seconds for one clip.
        count_frames: whether `Clip.frame_numbers` are needed, which forbids seeking.
    """

    num_frames: int
    fps: float | None
    sizes: Sequence[Size]
    crop: Literal["center", "letterbox"] = "center"
    clips_per_video: int = 1
    timeout: float = 300.0
    count_frames: bool = False


@dataclass(frozen=True)
class Clip:
    """A decoded clip.

    Attributes:
        frames: uint8 `[F, H, W, 3]`.
        frame_numbers: of which frames of the source, counted from 0; of use only with `ClipFormat.count_frames`.
        fps: frames per second; None for pictures that have no rate.
    """

    frames: np.ndarray
    frame_numbers: np.ndarray
    fps: float | None


@dataclass(frozen=True)
class Window:
    """Where a clip begins in its source: the time in seconds from the first frame, and (pictures) the frame number."""

    start: float
    frame: int


@dataclass(frozen=True)
class _Timed:
    """A frame, where it is in its source, from when and how long it is shown, both in seconds."""

    picture: av.VideoFrame
    number: int
    start: float
    duration: float


def decode_clip(media: Media, clip_format: ClipFormat, window: Window | None = None) -> Clip:
    """The clip that begins at `window`, or with the first frame.

    Raises:
        BadClipError: for a source that is damaged, too short, or of a shape too far from all sizes.
    """
    if isinstance(media, tuple):
        return _decode_pictures(media, clip_format, window)
    try:
        if window is not None and window.start > _SEEK_SECONDS and not clip_format.count_frames:
            clip = _decode_video(media, clip_format, window, seek=True)
            if clip is not None:
                return clip
        clip = _decode_video(media, clip_format, window, seek=False)
    except av.FFmpegError as error:
        raise BadClipError("corrupt", f"{error.strerror or error}") from error
    assert clip is not None, "only seeking can miss its place"
    return clip


def plan_windows(media: Media, clip_format: ClipFormat) -> list[Window]:
    """Where up to `clips_per_video` clips begin that don't overlap and are evenly spread over the whole source.

    Reads all packets of a video, but decodes nothing.

    Raises:
        BadClipError: for a source that is damaged or too short.
    """
    length = clip_format.num_frames
    if isinstance(media, tuple):
        starts = _spread(len(media), length, clip_format.clips_per_video)
        return [Window(0.0, start) for start in starts]
    try:
        with _opened(media) as (container, stream):
            times, end = _packet_times(container, stream)
    except av.FFmpegError as error:
        raise BadClipError("corrupt", f"{error.strerror or error}") from error
    if not times:
        raise BadClipError("corrupt", "no frame has a time")
    if clip_format.fps is None:
        return [Window(times[start] - times[0], start) for start in _spread(len(times), length, _count(clip_format))]
    total = int((end - times[0]) * clip_format.fps + 1e-3)
    return [Window(start / clip_format.fps, 0) for start in _spread(total, length, _count(clip_format))]


def _count(clip_format: ClipFormat) -> int:
    return clip_format.clips_per_video


def _spread(total: int, length: int, count: int) -> list[int]:
    count = min(count, total // length)
    if count < 1:
        raise BadClipError("too short", f"{total} of {length} frames")
    return [0] if count == 1 else [round(index * (total - length) / (count - 1)) for index in range(count)]


@contextmanager
def _opened(media: Path | bytes) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream."""
    source: Any = io.BytesIO(media) if isinstance(media, bytes) else str(media)
    with av.open(source, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise BadClipError("corrupt", "there is no video stream that can be decoded")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _DECODER_THREADS
        stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
        yield container, stream


def _packet_times(container: Any, stream: Any) -> tuple[list[float], float]:
    """Start times of all frames in seconds, in order, and the end of the last."""
    times, end = [], 0.0
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size:
            times.append(float(packet.pts * packet.time_base))
            end = max(end, times[-1] + float((packet.duration or 0) * packet.time_base))
    times.sort()
    if len(times) > 1 and end <= times[-1]:
        end = 2 * times[-1] - times[-2]
    return times, end


def _decode_video(media: Path | bytes, clip_format: ClipFormat, window: Window | None, *, seek: bool) -> Clip | None:
    """The clip, or None if seeking didn't lead to its place."""
    with _opened(media) as (container, stream):
        tick = float(stream.time_base or 0)
        start = 0.0 if window is None else window.start
        origin = None
        if seek:
            # The origin that a decoding from the beginning would find.
            first = next((p for p in container.demux(stream) if p.pts is not None), None)
            origin = None if first is None else float(first.pts * first.time_base)
            container.seek(int(((origin or 0.0) + start) / tick) if tick else 0, stream=stream)
        frames = _timed_frames(container, stream, clip_format.timeout, origin)
        collector = _Collector(clip_format, stream, start=start, tick=tick)
        for frame in frames:
            if seek and collector.held is None and frame.start > start + collector.tolerance:
                return None
            if collector.take(frame):
                break
        else:
            collector.finish()
        return collector.clip()


def _timed_frames(container: Any, stream: Any, timeout: float, origin: float | None) -> Iterator[_Timed]:
    """Decoded frames in the order of their times, which count from `origin` or else from the first frame."""
    deadline = time.monotonic() + timeout
    typical = float(1 / stream.average_rate) if stream.average_rate else 0.0
    last = -float("inf")
    for number, picture in enumerate(container.decode(stream)):
        if time.monotonic() > deadline:
            raise BadClipError("too slow", f"decoding took more than {timeout:g} s")
        if picture.is_corrupt:
            raise BadClipError("corrupt", f"frame {number} is damaged")
        duration = float(picture.duration * picture.time_base) if picture.duration and picture.time_base else typical
        start = last + typical if picture.time is None else float(picture.time) - (origin or 0.0)
        if origin is None:
            origin, start = (picture.time or 0.0), 0.0
        # A frame that isn't later than the one before can't be shown.
        if start > last:
            last = start
            yield _Timed(picture, number, start, duration)


class _Collector:
    """Picks the frame that is shown at each wanted time, and brings it to its size."""

    def __init__(self, clip_format: ClipFormat, stream: Any, *, start: float, tick: float) -> None:
        self.format = clip_format
        self.stream = stream
        self.start = start
        # Containers round times to their ticks: a frame may come so much late and still be the one of its time.
        self.tolerance = min(tick, 0.25 / (clip_format.fps or _rate(stream) or 1000.0)) + 1e-6
        self.held: _Timed | None = None
        self.fitted: np.ndarray | None = None
        self.frames: list[np.ndarray] = []
        self.numbers: list[int] = []

    def take(self, frame: _Timed) -> bool:
        """Look at the next frame; True once the clip is complete."""
        if self.held is not None:
            self._emit_until(frame.start)
        self.held, self.fitted = frame, None
        return len(self.frames) == self.format.num_frames

    def finish(self) -> None:
        """No further frame comes: the last one is shown for its duration."""
        if self.held is not None:
            self._emit_until(self.held.start + self.held.duration, is_last=True)

    def clip(self) -> Clip:
        """The collected frames."""
        found, wanted = len(self.frames), self.format.num_frames
        if found == 0 and self.held is None:
            raise BadClipError("corrupt", "there are no frames")
        if found < wanted:
            raise BadClipError("too short", f"{found} of {wanted} frames")
        return Clip(np.stack(self.frames), np.array(self.numbers), self.format.fps or _rate(self.stream))

    def _emit_until(self, end: float, *, is_last: bool = False) -> None:
        """Add the held frame for each wanted time that it is shown at, up to `end`."""
        assert self.held is not None
        if self.format.fps is None:
            if self.held.start + self.tolerance >= self.start:
                self._emit()
            return
        # The last frame is there at its own time, whatever its duration.
        end = max(end, self.held.start + 2 * self.tolerance) if is_last else end
        while len(self.frames) < self.format.num_frames:
            wanted = self.start + len(self.frames) / self.format.fps
            if wanted + self.tolerance >= end:
                return
            self._emit()

    def _emit(self) -> None:
        assert self.held is not None
        if self.fitted is None:
            self.fitted = self._fit(self.held.picture)
        self.frames.append(self.fitted)
        self.numbers.append(self.held.number)

    def _fit(self, picture: av.VideoFrame) -> np.ndarray:
        pixel_aspect = self.stream.sample_aspect_ratio or Fraction(1)
        shown = display_size(picture, pixel_aspect)
        size = self.frames[0].shape[:2] if self.frames else choose_bucket(*shown, self.format.sizes)
        return _fit(picture, size, self.format.crop, pixel_aspect)


def _fit(picture: av.VideoFrame, size: Size, crop: Literal["center", "letterbox"], aspect: Fraction) -> np.ndarray:
    try:
        return fit_frame(picture, size, crop=crop, pixel_aspect=aspect)
    except ValueError as error:
        if isinstance(error, av.FFmpegError):
            raise
        raise BadClipError("odd shape", str(error)) from error


def _rate(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _decode_pictures(paths: tuple[Path, ...], clip_format: ClipFormat, window: Window | None) -> Clip:
    """A clip of pictures, which have no rate: they are taken one by one."""
    first, length = 0 if window is None else window.frame, clip_format.num_frames
    if len(paths) - first < length:
        raise BadClipError("too short", f"{len(paths) - first} of {length} frames")
    deadline = time.monotonic() + clip_format.timeout
    frames: list[np.ndarray] = []
    for path in paths[first : first + length]:
        if time.monotonic() > deadline:
            raise BadClipError("too slow", f"decoding took more than {clip_format.timeout:g} s")
        picture = _read_picture(path)
        size = frames[0].shape[:2] if frames else choose_bucket(picture.height, picture.width, clip_format.sizes)
        frames.append(_fit(picture, size, clip_format.crop, Fraction(1)))
    return Clip(np.stack(frames), np.arange(first, first + length), clip_format.fps)


def _read_picture(path: Path) -> av.VideoFrame:
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise BadClipError("odd shape", f"{path.name} has {opened.width} x {opened.height} pixels")
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadClipError("corrupt", f"{path.name}: {error}") from error
    return av.VideoFrame.from_ndarray(np.asarray(upright), format="rgb24")
