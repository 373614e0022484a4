"""What the digits students of the causal scenario are worth: quality, speed, and quality along clips of 15 frames.

The bidirectional teacher, the causal student after KD and the one after Self-Forcing get the same prompts.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from metrics import Evaluator, Quality
from report import print_table, write_curves, write_samples, write_table
from sampling import NOISE_SEED, Row, draw_noise, generate, make_row
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fv_distill.data.digits import CAPTIONS, NUM_FRAMES, WRAP_PERIOD, from_latents, sample_clips
from fv_distill.generation import VideoStreamer
from fv_distill.rollouts import stream_chunks

HERE = Path(__file__).resolve().parent
TEACHER = HERE / "teacher"
TEACHER_STEPS = 25
TEACHER_GUIDANCE = 1.5
LONG_FRAMES = 3 * NUM_FRAMES
THIRDS = range(0, LONG_FRAMES, NUM_FRAMES)
ALL_PARTS = range(LONG_FRAMES - NUM_FRAMES + 1)
TIMED_CLIPS = 5
TITLE = "Causal digits demo"
TEACHER_NAME = "teacher, bidirectional"
LONG_TEACHER_NAME = f"teacher, {LONG_FRAMES} frames at once"
KD_NAME = "causal KD"
STUDENT_NAME = "Self-Forcing"


@dataclass(frozen=True)
class StreamingRow(Row):
    """With frames per second of one clip, and seconds until its first frame; None for real clips."""

    frames_per_second: float | None
    latency_first_chunk_s: float | None


@dataclass(frozen=True)
class PartQuality:
    """The quality of five frames of a long clip, against the same frames of real clips."""

    name: str
    first_frame: int
    frechet_cnn: float
    frechet_pixel: float
    prompt_accuracy: float


def measure_and_report(output: Path, *, seed: int, fast: bool, seconds: dict[str, float], started: float) -> None:
    """Write results.json, results.md, samples.png, samples.gif, by_frame.png and curves.png."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    count, steps = (80, 4) if fast else (1000, TEACHER_STEPS)
    begun = time.monotonic()
    rows, by_frame, clips = measure(output, count=count, teacher_steps=steps, parts=THIRDS if fast else ALL_PARTS)
    seconds = {
        **seconds,
        "measuring": round(time.monotonic() - begun, 1),
        "whole": round(time.monotonic() - started, 1),
    }
    results = {
        "seed": seed,
        "clips": count,
        "fast": fast,
        "seconds": seconds,
        "rows": [asdict(row) for row in rows],
        "bar": check_bar(rows, by_frame),
        "by_frame": [asdict(part) for part in by_frame],
    }
    write_samples(clips, output)
    write_curves(output / "self_forcing" / "metrics.jsonl", output / "curves.png")
    draw_by_frame(by_frame, output / "by_frame.png")
    write_table(TITLE, results, output / "results.md")
    append_by_frame(by_frame, output / "results.md")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(TITLE, results)
    print(f"wrote {', '.join(sorted(path.name for path in output.iterdir() if path.is_file()))} to {output}")


def measure(
    output: Path, *, count: int, teacher_steps: int, parts: Sequence[int]
) -> tuple[list[StreamingRow], list[PartQuality], dict[str, Tensor]]:
    """The rows, the quality along long clips, and those clips."""
    captions = torch.arange(count) % len(CAPTIONS)
    held_out = sample_clips("held_out", count, torch.Generator().manual_seed(NOISE_SEED), motion="wrap")
    real = make_row("real, held out", None, None, 0, evaluator(0)(held_out.clips, held_out.captions), 0.0)
    rows = [StreamingRow(**asdict(real), frames_per_second=None, latency_first_chunk_s=None)]
    clips = {}

    teacher = DiffusionPipeline.from_pretrained(TEACHER)
    sample = functools.partial(generate, teacher, steps=teacher_steps, guidance=TEACHER_GUIDANCE)
    start = time.monotonic()
    quality = evaluator(0)(sample(captions, draw_noise(count)), captions)
    row = make_row(TEACHER_NAME, teacher_steps, TEACHER_GUIDANCE, 2 * teacher_steps, quality, time.monotonic() - start)
    speed = time_clips(lambda caption: [sample(torch.tensor([caption]), draw_noise(1))])
    rows.append(StreamingRow(**asdict(row), **speed))
    # Three times what it was trained on, all at once: it has no other way.
    clips[LONG_TEACHER_NAME] = sample(captions, draw_noise(count, LONG_FRAMES))

    for name, directory in ((KD_NAME, output / "kd-student"), (STUDENT_NAME, output / "student")):
        streamer = VideoStreamer.from_pretrained(directory)
        steps = len(streamer.sigmas)
        start = time.monotonic()
        short = stream_batch(streamer, captions, NUM_FRAMES)
        seconds = time.monotonic() - start
        # Each frame takes a call a step, and one more to be remembered, which nobody needs of the last.
        passes = NUM_FRAMES * (steps + 1) - 1
        row = make_row(name, steps, 1.0, passes, evaluator(0)(short, captions), seconds)
        speed = time_clips(functools.partial(stream_caption, streamer))
        rows.append(StreamingRow(**asdict(row), **speed))
        clips[name] = stream_batch(streamer, captions, LONG_FRAMES)

    by_frame = [
        make_part(name, first, evaluator(first % WRAP_PERIOD)(long[:, :, first : first + NUM_FRAMES], captions))
        for name, long in clips.items()
        for first in parts
    ]
    return rows, by_frame, clips


@functools.cache
def evaluator(first_frame: int) -> Evaluator:
    """Against real clips from a frame on; after a period they look the same again."""
    frames = range(first_frame, first_frame + NUM_FRAMES)
    return Evaluator(motion="wrap", frames=frames, judge_file=HERE / "judge.safetensors")


@torch.no_grad()
def stream_batch(streamer: VideoStreamer, captions: Tensor, num_frames: int) -> Tensor:
    """Clips `[N, 1, F, 16, 16]` in [-1, 1] of a causal student, streamed all at a time."""
    model, count = streamer.model, len(captions)
    conditioning = model.encode_prompts([CAPTIONS[caption] for caption in captions.tolist()])
    shape = (streamer.latent_shape[0], num_frames, *streamer.latent_shape[2:])
    generator = torch.Generator().manual_seed(NOISE_SEED)

    def noise(*_: int) -> Tensor:
        return torch.randn((count, shape[0], model.chunk_size, *shape[2:]), generator=generator)

    chunks = stream_chunks(
        model,
        noise,
        conditioning,
        streamer.sigmas,
        num_chunks=num_frames // model.chunk_size,
        cache=model.new_cache(count, shape, rolling=True),
        sample_type=streamer.sample_type,
        fresh_noise=noise,
        context_noise=streamer.context_noise,
        context_fresh_noise=noise,
    )
    return from_latents(torch.cat(list(chunks), dim=2) * model.latents_std + model.latents_mean)


def stream_caption(streamer: VideoStreamer, caption: int) -> Any:
    """The frames of one clip as they come."""
    return streamer.stream(CAPTIONS[caption], num_frames=NUM_FRAMES)


def time_clips(make: Callable[[int], Any]) -> dict[str, float]:
    """Median speed over a few clips of a batch of one; the first, which warms up, doesn't count."""
    latencies, totals = [], []
    for caption in range(TIMED_CLIPS + 1):
        start = time.perf_counter()
        pieces = iter(make(caption))
        next(pieces)
        latencies.append(time.perf_counter() - start)
        for _ in pieces:
            pass
        totals.append(time.perf_counter() - start)
    return {
        "frames_per_second": round(NUM_FRAMES / statistics.median(totals[1:]), 1),
        "latency_first_chunk_s": round(statistics.median(latencies[1:]), 4),
    }


def make_part(name: str, first_frame: int, quality: Quality) -> PartQuality:
    """With rounded figures."""
    return PartQuality(
        name,
        first_frame,
        round(quality.frechet_cnn, 3),
        round(quality.frechet_pixel, 3),
        round(quality.prompt_accuracy, 4),
    )


def check_bar(rows: list[StreamingRow], by_frame: list[PartQuality]) -> dict[str, Any]:
    """The student against the one it started from, and the last third of long clips against the first."""
    kd, student = rows[-2:]
    thirds = {part.first_frame: part for part in by_frame if part.name == STUDENT_NAME}
    first, last = thirds[THIRDS[0]], thirds[THIRDS[-1]]
    cnn, pixel = student.frechet_cnn / kd.frechet_cnn, student.frechet_pixel / kd.frechet_pixel
    late_cnn, late_pixel = last.frechet_cnn / first.frechet_cnn, last.frechet_pixel / first.frechet_pixel
    return {
        "frechet_cnn over causal KD's, below 1": round(cnn, 3),
        "frechet_pixel over causal KD's, below 1": round(pixel, 3),
        "frechet_cnn of the last third over the first's, at most 1.25": round(late_cnn, 3),
        "frechet_pixel of the last third over the first's, at most 1.25": round(late_pixel, 3),
        "met": max(cnn, pixel) < 1 and max(late_cnn, late_pixel) <= 1.25,
    }


def draw_by_frame(by_frame: list[PartQuality], path: Path) -> None:
    """Both distances and the accuracy against the frame."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, measure_name in zip(axes, ("frechet_cnn", "frechet_pixel", "prompt_accuracy"), strict=True):
        for name, parts in group_by_name(by_frame).items():
            first_frames = [part.first_frame for part in parts]
            axis.plot(first_frames, [getattr(part, measure_name) for part in parts], label=name, marker=".")
        axis.set(title=measure_name.replace("_", " "), xlabel="first of the five frames measured", ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def append_by_frame(by_frame: list[PartQuality], path: Path) -> None:
    """Thirds of the long clips as Markdown: CNN distance / pixel distance / prompt accuracy."""
    lines = ["", f"Clips of {LONG_FRAMES} frames, three times as long as in training (CNN / pixel / accuracy):", ""]
    lines += ["| | " + " | ".join(f"frames {first}-{first + NUM_FRAMES - 1}" for first in THIRDS) + " |"]
    lines += ["|---" * (1 + len(THIRDS)) + "|"]
    for name, parts in group_by_name(by_frame).items():
        figures = [
            f"{part.frechet_cnn:.2f} / {part.frechet_pixel:.2f} / {part.prompt_accuracy:.1%}"
            for part in parts
            if part.first_frame in THIRDS
        ]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")


def group_by_name(by_frame: list[PartQuality]) -> Mapping[str, list[PartQuality]]:
    """In the order of the frames."""
    names = dict.fromkeys(part.name for part in by_frame)
    return {name: [part for part in by_frame if part.name == name] for name in names}
