"""`fv-distill preprocess`: all captions first, then all clips, each process its share.

Where the text encoder reads the clip too, captions are encoded with the clips.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from fv_distill.console import console
from fv_distill.data.schema import DataError
from fv_distill.gloo import await_gloo_at_exit
from fv_distill.models.encoders import Encoders
from fv_distill.models.pretrained import parse_dtype, resolve_directory

from .actions import needed_actions, read_actions
from .ahead import Decoded, decode_ahead
from .buckets import Size, check_sizes, make_buckets, parse_size
from .decode import BadClipError, Clip, ClipFormat
from .encode import TILING_AREA, Geometry, encode_captions, encode_clip, encode_clip_caption, read_geometry
from .families import encoders_class
from .options import PreprocessOptions
from .progress import counted, progress
from .shards import finished_items, remove_unfinished, shard_files, write_shards
from .sources import Source, open_source
from .summary import SUMMARY_FILE, SkipLog, Summary, summarise
from .text_cache import TextCache, chunks, share_of

SETTINGS_FILE = "preprocess.json"
_TEXT_FOLDER = ".captions"
_TEXT_BATCH = 8
# Processes wait for the slowest one, which may be hours behind; the launcher ends them if one dies.
_WAIT = timedelta(days=30)


def preprocess(options: PreprocessOptions) -> Summary:
    """Encode what `options` describe and write it as rows; every process of a launch calls this.

    Returns:
        What became of the items, the same on every process.

    Raises:
        FileNotFoundError: if model or data are not there.
        ValueError: for options that don't fit the model, or an output directory of other rows.
        DataError: if no row at all was made.
    """
    # Without the flag accelerate starts no process group for several processes on a machine that has only CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_WAIT)
    await_gloo_at_exit()
    work = Preprocessing(options, state)
    work.prepare_output()
    work.encode_texts()
    work.encode_clips()
    return work.finish()


class Preprocessing:
    """One process's part of one call; its steps are taken in this order.

    Args:
        options: what is made.
        state: which process this is.
    """

    def __init__(self, options: PreprocessOptions, state: PartialState) -> None:
        self.options = options
        self.state = state
        self.output = Path(options.output).expanduser()
        self.device = torch.device(options.device) if options.device else state.device
        self.model = resolve_directory(options.model, name="model")
        self.encoders_class = encoders_class(self.model, options.adapter)
        self.source = open_source(options)
        if not (self.source.has_video or self.encoders_class.reads_text):
            raise ValueError(f"data: {options.data} has no videos, and {self.model} reads no text: no row can be made")
        if self.source.has_video and options.num_frames < (fewest := self.encoders_class.fewest_frames(self.model)):
            raise ValueError(
                f"num-frames: {options.num_frames} are too few: {self.model} makes no clips of fewer than {fewest} "
                f"frames; take {fewest} or more"
            )
        if not self.source.has_video and self.encoders_class.text_reads_image:
            raise ValueError(
                f"data: {options.data} has no videos, but the text encoder of {self.model} reads a clip's first frame "
                "beside its caption: prompts alone make no rows; give videos with captions"
            )
        self.encoders_class.check_text_length(self.model, options.text_length)
        self.clip_format = clip_format(options, read_geometry(self.model)) if self.source.has_video else None
        self.actions = needed_actions(self.model) if options.actions else ()
        self.texts = TextCache(self.output / _TEXT_FOLDER)
        self.pending: list[int] = []

    def prepare_output(self) -> None:
        """Find out what is done; the main process tidies up before anybody writes."""
        settings = {**self.options.row_facts(), "items": _identity(self.source)}
        # Every process looks before the main one writes, so that all of them see the same directory.
        _check_ours(self.output)
        if not self.options.overwrite:
            _check_same_settings(self.output, settings)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            if self.options.overwrite:
                _remove_rows(self.output, self.texts)
            remove_unfinished(self.output)
            _write_whole(self.output / SETTINGS_FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        self.state.wait_for_everyone()
        done = finished_items(self.output)
        self.pending = [index for index in range(len(self.source)) if self.source.key(index) not in done]
        if done and self.state.is_main_process:
            console.print(f"{len(self.source) - len(self.pending)} of {len(self.source)} items are there already")

    def encode_texts(self) -> None:
        """Encode the distinct captions of what is to be done, each once over all processes.

        Not those that are read with their clips, which `encode_clips` encodes.
        """
        if not self.encoders_class.reads_text or self.encoders_class.text_reads_image:
            return
        rank, num_ranks = self.state.process_index, self.state.num_processes
        mine = share_of(self._captions(), rank=rank, num_ranks=num_ranks)
        missing = [caption for caption in mine if not self.texts.has(caption)]
        dtype = self._text_dtype()
        encoders = self._encoders(dtype)
        with self._progress("captions", len(missing) * num_ranks) as report:
            for batch in counted(list(chunks(missing, _TEXT_BATCH)), lambda n, _: report(n * _TEXT_BATCH, 0)):
                for caption, row in zip(batch, encode_captions(encoders, batch, dtype), strict=True):
                    self.texts.save(caption, row)
        del encoders
        _free_memory()
        self.state.wait_for_everyone()

    def encode_clips(self) -> None:
        """Decode in threads what this one encodes, and write rows as they come."""
        share = self.pending[self.state.process_index :: self.state.num_processes]
        skips = SkipLog(self.output, self.state.process_index)
        try:
            rows = self._rows(share, skips)
            write_shards(self.output, rows, rank=self.state.process_index, shard_rows=self.options.shard_rows)
        finally:
            skips.close()
        self.state.wait_for_everyone()

    def finish(self) -> Summary:
        """Put the summary together, on the main process, and read it on all."""
        if self.state.is_main_process:
            summary = summarise(self.output, num_items=len(self.source))
            summary.write(self.output)
            self.texts.remove()
            for line in summary.lines():
                console.print(line, highlight=False, markup=False)
        self.state.wait_for_everyone()
        summary = Summary(**json.loads((self.output / SUMMARY_FILE).read_text(encoding="utf-8")))
        if not summary.rows:
            reasons = ", ".join(f"{count} skipped ({reason})" for reason, count in summary.skipped.items())
            raise DataError(f"no row could be made of {self.options.data}: {reasons or 'nothing is there'}")
        return summary

    def _captions(self) -> Iterator[str]:
        for index in self.pending:
            try:
                yield self.source.caption(index)
            except BadClipError:
                # Reported with the clips.
                continue

    def _rows(self, share: Sequence[int], skips: SkipLog) -> Iterator[dict[str, Any]]:
        encoders = self._encoders(parse_dtype(self.options.vae_dtype))
        # Captions that are encoded with their clips have a type of their own.
        readers = self._encoders(self._text_dtype()) if self.encoders_class.text_reads_image else encoders
        if self.clip_format is not None:
            encoders.tile_vae(enabled=_wants_tiles(self.options.vae_tiling, self.clip_format.sizes))
        decoded = decode_ahead(
            self.source,
            share,
            self.clip_format,
            workers=self.options.decode_workers,
            needs_caption=self.encoders_class.reads_text,
        )
        with self._progress("clips", len(self.pending)) as report, contextlib.closing(decoded):
            for done, (_, clips) in enumerate(itertools.groupby(decoded, key=lambda clip: clip.index), start=1):
                for clip in clips:
                    try:
                        yield self._row(clip, encoders, readers)
                    except BadClipError as error:
                        skips.add(clip.name, error)
                report(done, skips.count)

    def _row(self, decoded: Decoded, encoders: Encoders, readers: Encoders) -> dict[str, Any]:
        if decoded.error is not None:
            raise decoded.error
        clip, index = decoded.clip, decoded.index
        row = {"id": decoded.name, "file_name": self.source.key(index), **self._text(index, clip, readers)}
        if clip is None:
            return row | {"media_type": "text"}
        if self.options.actions:
            row |= read_actions(self.source.actions_file(index), clip.frame_numbers, self.actions)
        num_frames, height, width = clip.frames.shape[:3]
        return {
            **row,
            **encode_clip(encoders, clip.frames, parse_dtype(self.options.latent_dtype)),
            "media_type": "image" if num_frames == 1 else "video",
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "duration_sec": num_frames / clip.fps if clip.fps else None,
            "fps": clip.fps,
        }

    def _text(self, index: int, clip: Clip | None, readers: Encoders) -> dict[str, Any]:
        if self.encoders_class.text_reads_image:
            assert clip is not None, "a source without videos was refused"
            caption = self.source.caption(index)
            return {"caption": caption, **encode_clip_caption(readers, caption, clip.frames, readers.dtype)}
        if self.encoders_class.reads_text:
            caption = self.source.caption(index)
            return {"caption": caption, **self.texts.load(caption)}
        # Nobody reads it, so that clips without one are as good.
        with contextlib.suppress(BadClipError):
            return {"caption": self.source.caption(index), "text_embedding": None}
        return {"caption": "", "text_embedding": None}

    def _encoders(self, dtype: torch.dtype) -> Encoders:
        return self.encoders_class(self.model, device=self.device, dtype=dtype, text_length=self.options.text_length)

    def _text_dtype(self) -> torch.dtype:
        if self.options.text_dtype == "auto":
            return torch.float32 if self.device.type == "cpu" else torch.bfloat16
        return parse_dtype(self.options.text_dtype)

    def _progress(self, name: str, total: int) -> Any:
        return progress(name, total, num_ranks=self.state.num_processes, enabled=self.state.is_main_process)


def clip_format(options: PreprocessOptions, geometry: Geometry) -> ClipFormat:
    """What the options say of clips, checked against the model.

    Raises:
        ValueError: for frames or sizes that the model doesn't take, or none.
    """
    geometry.check_num_frames(options.num_frames)
    if options.max_area is not None:
        height, width = parse_size(options.max_area)
        sizes = make_buckets(height * width, geometry.multiple)
    else:
        single = [] if options.resolution is None else [options.resolution]
        sizes = [parse_size(size) for size in options.buckets or single]
        check_sizes(sizes, geometry.multiple, option="buckets" if options.buckets else "resolution")
    if not sizes:
        raise ValueError("the clips need a size: give --resolution HxW, --buckets HxW HxW ..., or --max-area HxW")
    return ClipFormat(
        num_frames=options.num_frames,
        fps=options.fps,
        sizes=sizes,
        crop=options.crop,
        clips_per_video=options.clips_per_video,
        timeout=options.clip_timeout,
        count_frames=options.actions,
    )


def _wants_tiles(choice: str, sizes: Sequence[Size]) -> bool:
    return choice == "on" or (choice == "auto" and max(height * width for height, width in sizes) > TILING_AREA)


def _identity(source: Source) -> dict[str, Any]:
    """What tells this source from another under the same path."""
    return {"kind": type(source).__name__, "fingerprint": source.fingerprint}


def _check_ours(output: Path) -> None:
    if any(output.glob("*.parquet")) and not (output / SETTINGS_FILE).is_file():
        raise ValueError(f"output: {output} holds parquet files that this command didn't make; give another")


def _check_same_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / SETTINGS_FILE
    if not path.is_file():
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(settings)).items():
        if stored.get(key) != value:
            raise ValueError(
                f"output: the rows in {output} were made with {key.replace('_', '-')}={stored.get(key)!r}, now it is "
                f"{value!r}; change it back, give another --output, or --overwrite to make them anew"
            )


def _remove_rows(output: Path, texts: TextCache) -> None:
    for path in [*shard_files(output), *output.glob("skipped-*.jsonl")]:
        path.unlink()
    texts.remove()


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _free_memory() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
