"""What `fv-distill generate` does once its words are read."""

import argparse
import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .callbacks.video_files import check_video_path, load_first_frame, write_video, write_video_stream
from .console import console
from .data.action_files import read_action_file
from .export.call_arguments import needs_image, takes_image, takes_prompt
from .generation import VideoStreamer
from .models.pipeline_index import pipeline_class
from .models.pretrained import resolve_directory


def generate_video(args: argparse.Namespace) -> None:
    """Write one video and say how fast it came.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: for options that don't fit the model or the file.
    """
    check_video_path(args.output)
    if args.fps <= 0:
        raise ValueError(f"--fps {args.fps:g} must be positive")
    directory = resolve_directory(args.model, name="--model")
    info_file = directory / "fv_distill.json"
    info = json.loads(info_file.read_text()) if info_file.is_file() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if info.get("causal"):
        _stream(directory, args)
    elif args.stream:
        raise ValueError(f"--stream, but {directory} is no causal student's export: it makes all frames at once")
    else:
        _sample(directory, info.get("call", {}), args)
    console.print(f"wrote {args.output}", highlight=False, markup=False)


def _stream(directory: Path, args: argparse.Namespace) -> None:
    streamer = VideoStreamer.from_pretrained(
        directory, device=args.device, num_inference_steps=args.num_inference_steps
    )
    _check_prompt(args.prompt, is_read=streamer.model.reads_text)
    if streamer.model.reads_text:
        # Encoded before the clock starts: the text encoder's loading is no part of a chunk's latency.
        streamer.model.prompt_conditioning(args.prompt)
        guidance_scale = streamer.guidance_scale if args.guidance_scale is None else args.guidance_scale
        if guidance_scale != 1:
            streamer.model.prompt_conditioning(args.negative_prompt)
    given = ("num_frames", "seed", "height", "width", "guidance_scale", "negative_prompt")
    options: dict[str, Any] = {name: getattr(args, name) for name in given}
    if args.image is not None:
        (_, _, rows, columns), _ = streamer.plan(height=args.height, width=args.width)
        factor = streamer.spatial_factor
        pixels = np.asarray(_load_image(args.image, columns * factor, rows * factor))
        options["image"] = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)
    if args.actions is not None:
        options["actions"] = read_action_file(args.actions)
    chunks = streamer.stream(args.prompt or "", **options)
    write_video_stream(args.output, _timed(chunks, told=args.stream), fps=args.fps)


def _check_prompt(prompt: str | None, *, is_read: bool) -> None:
    if is_read and prompt is None:
        raise ValueError("the model makes videos of a text; give --prompt")
    if prompt is not None and not is_read:
        raise ValueError(f"--prompt {prompt!r}, but the model reads no text; leave it out")


def _timed(chunks: Iterator[np.ndarray], *, told: bool) -> Iterator[np.ndarray]:
    """Hand chunks on, and print how long each took and what that comes to."""
    latencies, frames = [], 0
    while True:
        start = time.perf_counter()
        chunk = next(chunks, None)
        if chunk is None:
            break
        latencies.append(time.perf_counter() - start)
        frames += len(chunk)
        if told:
            console.print(f"chunk {len(latencies)}: {len(chunk)} frames, {latencies[-1]:.3f} s", highlight=False)
        yield chunk
    console.print(
        f"{frames} frames, {frames / sum(latencies):.1f} frames/s, first chunk after {latencies[0]:.3f} s",
        highlight=False,
    )


def _sample(directory: Path, call: dict[str, Any], args: argparse.Namespace) -> None:
    device = torch.device(args.device or torch.accelerator.current_accelerator() or "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipeline: Any = pipeline_class(directory).from_pretrained(directory, dtype=dtype).to(device)
    given = ("num_frames", "num_inference_steps", "height", "width", "guidance_scale")
    call = call | {key: value for key in given if (value := getattr(args, key)) is not None}
    torch.manual_seed(args.seed)  # a scheduler that noises afresh draws from the global generator
    if args.negative_prompt:
        call["negative_prompt"] = args.negative_prompt
    call |= _inputs(type(pipeline), args, call)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    for key in call:
        if key not in parameters:
            raise ValueError(
                f"--{key.replace('_', '-')}: the model's {type(pipeline).__name__} takes no {key}; leave it out"
            )
    start = time.perf_counter()
    frames = pipeline(generator=torch.Generator().manual_seed(args.seed), output_type="np", **call).frames[0]
    seconds = time.perf_counter() - start
    write_video(args.output, (frames.clip(0, 1) * 255).round().astype(np.uint8), fps=args.fps)
    console.print(f"{len(frames)} frames, {len(frames) / seconds:.1f} frames/s, all at once", highlight=False)


def _inputs(pipeline_class: Any, args: argparse.Namespace, call: dict[str, Any]) -> dict[str, Any]:
    """What the video shall show, by the names of the pipeline's arguments.

    Raises:
        ValueError: for what the pipeline needs and is not given, or is given and can't take.
    """
    parameters = inspect.signature(pipeline_class.__call__).parameters
    reads_text = takes_prompt(pipeline_class)
    _check_prompt(args.prompt, is_read=reads_text)
    given = {"prompt": args.prompt} if reads_text else {}
    given |= _image_argument(pipeline_class, call, args.image)
    if args.actions is not None:
        actions = read_action_file(args.actions)
        if unknown := [name for name in actions if name not in parameters]:
            raise ValueError(f"--actions {args.actions}, but a {pipeline_class.__name__} takes no {unknown[0]}")
        given |= actions
    return given


def _image_argument(pipeline_class: Any, call: dict[str, Any], image: Path | None) -> dict[str, Any]:
    """The first frame, in the size of the video, where the pipeline takes one."""
    name = pipeline_class.__name__
    if image is None:
        if needs_image(pipeline_class):
            raise ValueError(f"the model's {name} makes videos of a first frame; give --image FILE")
        return {}
    if not takes_image(pipeline_class):
        raise ValueError(f"--image {image}, but the model's {name} makes videos of text alone")
    parameters = inspect.signature(pipeline_class.__call__).parameters
    width, height = (
        call.get(key, parameters[key].default if key in parameters else None) for key in ("width", "height")
    )
    return {"image": _load_image(image, width, height)}


def _load_image(image: Path, width: int | None, height: int | None) -> Any:
    if not image.is_file():
        raise FileNotFoundError(f"--image {image}: no such file")
    return load_first_frame(image, width, height)
