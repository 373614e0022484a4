"""Decoding in threads, a few clips ahead of the one being encoded. PyAV decodes without the interpreter lock."""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from .decode import BadClipError, Clip, ClipFormat, Media, Window, decode_clip, plan_windows
from .sources import Source

Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Decoded:
    """What came of one clip of an item.

    Attributes:
        index: of the item in its source.
        name: the clip's row id: the item's key, with a number if the item has several clips.
        clip: None for text alone, and for a bad clip.
        error: why there will be no row.
    """

    index: int
    name: str
    clip: Clip | None = None
    error: BadClipError | None = None


@dataclass(frozen=True)
class _Job:
    index: int
    name: str
    media: Media | None = None
    window: Window | None = None
    error: BadClipError | None = None


def decode_ahead(
    source: Source, indices: Sequence[int], clip_format: ClipFormat | None, *, workers: int, needs_caption: bool
) -> Generator[Decoded, None, None]:
    """The clips of the items, in order, with `workers` of them in work or waiting.

    Args:
        source: of the items.
        indices: the items wanted.
        clip_format: what clips are brought to; None for text alone.
        workers: threads.
        needs_caption: whether an item without a caption is a bad one.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        plan = functools.partial(_plan, source, clip_format=clip_format, needs_caption=needs_caption)
        planned = _in_order(pool, plan, indices, ahead=workers)
        jobs = (job for item in planned for job in item)
        yield from _in_order(pool, lambda job: _decode(job, clip_format), jobs, ahead=workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Given], Result], values: Iterable[Given], *, ahead: int
) -> Iterator[Result]:
    futures: deque[Future[Result]] = deque()
    for value in values:
        futures.append(pool.submit(work, value))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _plan(source: Source, index: int, *, clip_format: ClipFormat | None, needs_caption: bool) -> list[_Job]:
    key = source.key(index)
    try:
        if needs_caption:
            source.caption(index)
        media = source.media(index)
        if media is None or clip_format is None or clip_format.clips_per_video == 1:
            return [_Job(index, key, media)]
        windows = plan_windows(media, clip_format)
    except BadClipError as error:
        return [_Job(index, key, error=error)]
    return [_Job(index, f"{key}#{number}", media, window) for number, window in enumerate(windows)]


def _decode(job: _Job, clip_format: ClipFormat | None) -> Decoded:
    if job.error is not None or job.media is None:
        return Decoded(job.index, job.name, error=job.error)
    assert clip_format is not None, "checked with the options"
    try:
        return Decoded(job.index, job.name, decode_clip(job.media, clip_format, job.window))
    except BadClipError as error:
        return Decoded(job.index, job.name, error=error)
