"""Clips from a stock pipeline or a streaming student, from the same starting noise.

The noise of a clip is one standard normal draw `[1, C, T, H, W]` from a generator of the clip's own, on the CPU. A
pipeline draws it itself from that generator; a causal student gets the same values chunk by chunk. That they are the
same is not taken for granted: of what a pipeline first calls its network with, and of what a stream is given, a
fingerprint is kept.
"""

import inspect
import time
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from fv_distill.export.scheduler import few_step_scheduler_for
from fv_distill.generation import VideoStreamer, even_sigmas, to_uint8
from fv_distill.models.pipeline_index import pipeline_class
from fv_distill.rng import derive_seed, generator_for

from .clips import Batch, Clip, Cost
from .counting import PeakMemory, fingerprint, synchronize, watch_calls
from .ways import ClipSize, Way, call_of_frames, read_info

# The evaluation's own to choose.
_SIZES = ("num_frames", "height", "width", "max_sequence_length")
_NETWORKS = ("transformer", "transformer_2", "unet")


class Sampler(Protocol):
    """Makes the clips of one way."""

    def sample(self, prompts: Sequence[str], indices: Sequence[int]) -> Batch:
        """A clip for each prompt; `indices` are the clips' places in the evaluation, which name their noise."""


class PipelineSampler:
    """A diffusers pipeline, as it is called by anyone.

    Args:
        way: the model, its steps and guidance.
        size: of the clips.
        seed: of the evaluation.
        negative_prompt: of guidance's other pass; None is the pipeline's own.
        device: where it runs.
        dtype: of all weights, the VAE's among them.
        pipeline: an already loaded pipeline of the same directory.

    Raises:
        ValueError: if the pipeline makes no videos, or doesn't take a step count or guidance that was given.
    """

    def __init__(
        self,
        way: Way,
        size: ClipSize,
        *,
        seed: int,
        negative_prompt: str | None,
        device: torch.device,
        dtype: torch.dtype,
        pipeline: Any = None,
    ) -> None:
        if pipeline is None:
            pipeline = pipeline_class(way.directory).from_pretrained(way.directory, dtype=dtype).to(device)
            pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self._device, self._seed = device, seed
        self._num_frames = size.num_frames
        self._parameters = inspect.signature(pipeline.__call__).parameters
        self._call = self._arguments(way, size, negative_prompt)
        self._scheduler = _even_scheduler(way, pipeline.scheduler)
        self._memory = PeakMemory(device)

    def sample(self, prompts: Sequence[str], indices: Sequence[int]) -> Batch:
        """See `Sampler.sample`."""
        latents: list[Tensor] = []
        call = dict(self._call)
        if "callback_on_step_end" in self._parameters:
            call["callback_on_step_end"] = lambda pipeline, step, timestep, tensors: _keep_last(latents, tensors)
        own_scheduler, self.pipeline.scheduler = self.pipeline.scheduler, self._scheduler
        self._memory.reset()
        try:
            with torch.no_grad(), _forked(self._device), watch_calls(_networks(self.pipeline), self._device) as seen:
                # Schedulers that noise afresh draw from the global generator, for the whole batch at once.
                torch.manual_seed(derive_seed(self._seed, "evaluate/fresh_noise", indices[0]))
                generators = [start_generator(self._seed, index) for index in indices]
                result = self.pipeline(list(prompts), generator=generators, output_type="np", **call)
                frames = to_uint8_array(result.frames)[:, : self._num_frames]
                ended = time.perf_counter()
        finally:
            self.pipeline.scheduler = own_scheduler
        assert seen.started is not None, "the pipeline has called none of its networks"
        seconds = ended - seen.started
        cost = Cost(seen.rows / len(prompts), seconds, seconds, self._memory.read())
        final: Sequence[Tensor | None] = list(latents[0]) if latents else [None] * len(prompts)
        noise = [fingerprint(row) for row in seen.noise[: len(prompts)]]
        return Batch([Clip(*row) for row in zip(frames, final, noise, strict=True)], cost)

    def _arguments(self, way: Way, size: ClipSize, negative_prompt: str | None) -> dict[str, Any]:
        name = type(self.pipeline).__name__
        if "num_frames" not in self._parameters:
            raise ValueError(f"{way.directory} is a {name}, which makes no videos (its call takes no num_frames)")
        frames = None if size.num_frames is None else call_of_frames(way.directory, size.num_frames)
        wanted = {"num_inference_steps": way.steps, "guidance_scale": way.guidance, "negative_prompt": negative_prompt}
        given = {**wanted, "num_frames": frames, "height": size.height, "width": size.width}
        given = {key: value for key, value in given.items() if value is not None}
        exported = read_info(way.directory)
        if exported.get("sigmas") is not None:
            # What a student of few steps is called with besides: the other guidances that a family has, say.
            own = {
                key: value for key, value in exported["call"].items() if key not in _SIZES and key in self._parameters
            }
            given = own | given
        if missing := [key for key in given if key not in self._parameters]:
            raise ValueError(f"{way.directory} is a {name}, whose call takes no {missing[0]}; leave the option out")
        if size.max_sequence_length is not None and "max_sequence_length" in self._parameters:
            given["max_sequence_length"] = size.max_sequence_length
        return given


class StreamSampler:
    """A causal student, clip by clip and chunk by chunk.

    Args:
        way: the model, its steps and guidance.
        size: of the clips.
        seed: of the evaluation.
        negative_prompt: of guidance's other pass; None is empty.
        device: where it runs.
        dtype: of the weights.
    """

    def __init__(
        self,
        way: Way,
        size: ClipSize,
        *,
        seed: int,
        negative_prompt: str | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._streamer = VideoStreamer.from_pretrained(
            way.directory, device=device, dtype=dtype, num_inference_steps=way.steps
        )
        self._shape, self._num_frames = self._streamer.plan(
            num_frames=size.num_frames, height=size.height, width=size.width
        )
        self._latent_frames = 1 + -(-(self._num_frames - 1) // self._streamer.frames_per_latent)
        self._guidance = self._streamer.guidance_scale if way.guidance is None else way.guidance
        self._negative_prompt = negative_prompt or ""
        self._device, self._seed = device, seed
        self._memory = PeakMemory(device)

    def sample(self, prompts: Sequence[str], indices: Sequence[int]) -> Batch:
        """See `Sampler.sample`; the clips of a batch are streamed one after the other."""
        self._memory.reset()
        clips, passes, seconds, first_seconds = [], 0, 0.0, []
        for prompt, index in zip(prompts, indices, strict=True):
            clip, calls, latencies = self._stream(prompt, index)
            clips.append(clip)
            passes += calls
            seconds += sum(latencies)
            first_seconds.append(latencies[0])
        mean = sum(first_seconds) / len(first_seconds)
        return Batch(clips, Cost(passes / len(clips), seconds, mean, self._memory.read()))

    def _stream(self, prompt: str, index: int) -> tuple[Clip, int, list[float]]:
        model = self._streamer.model
        # Text and decoder are loaded before the clock starts, as they are for a pipeline.
        model.prompt_conditioning(prompt)
        if self._guidance != 1:
            model.prompt_conditioning(self._negative_prompt)
        decode = model.streaming_decoder()
        noise, extra = self._noise(index)
        chunks = self._streamer.stream_latents(
            prompt,
            self._shape,
            seed=derive_seed(self._seed, "evaluate/stream", index),
            guidance_scale=self._guidance,
            negative_prompt=self._negative_prompt,
            noise=torch.cat([noise, extra], dim=2),
        )
        latents, frames, latencies = [], [], []
        with torch.no_grad(), watch_calls([model.transformer], self._device) as seen:
            synchronize(self._device)
            while True:
                start = time.perf_counter()
                chunk = next(chunks, None)
                if chunk is None:
                    break
                latents.append(chunk)
                frames.append(to_uint8(decode(chunk)))
                latencies.append(time.perf_counter() - start)
        clean = torch.cat(latents, dim=2)[0, :, : self._latent_frames].float().cpu()
        if not clean.isfinite().all():
            raise ValueError("the model makes latents that are not finite; try --dtype float32")
        started_from = fingerprint(noise[0].to(model.dtype))
        return Clip(np.concatenate(frames)[: self._num_frames], clean, started_from), seen.rows, latencies

    def _noise(self, index: int) -> tuple[Tensor, Tensor]:
        """A pipeline's noise for the clip, and that of the frames by which whole chunks are longer."""
        channels, frames, height, width = self._shape
        start = start_generator(self._seed, index)
        more = generator_for(self._seed, "evaluate/rest_of_chunk", index)
        noise = torch.randn((1, channels, self._latent_frames, height, width), generator=start)
        return noise, torch.randn((1, channels, frames - self._latent_frames, height, width), generator=more)


def start_generator(seed: int, index: int) -> torch.Generator:
    """Of the starting noise of a clip."""
    return generator_for(seed, "evaluate/start", index)


def _even_scheduler(way: Way, scheduler: Any) -> Any:
    """For few steps of a many-step model: `FlowMatchEulerDiscreteScheduler` shifts twice, which ruins a few steps."""
    if not way.even_steps or type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        return scheduler
    # diffusers' configuration mixin hides its attributes from type checkers.
    config: Any = cast(Any, scheduler).config
    if config.use_dynamic_shifting or config.stochastic_sampling:
        return scheduler
    assert way.steps is not None
    return few_step_scheduler_for(way.directory, even_sigmas(way.steps, config.shift), sample_type="ode")


def _keep_last(kept: list[Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Packed tokens of other families are no images that could be compared as such.
    if tensors["latents"].ndim == 5:
        kept[:] = [tensors["latents"].float().cpu()]
    return tensors


def _networks(pipeline: Any) -> list[nn.Module]:
    parts = pipeline.components
    return [parts[name] for name in _NETWORKS if isinstance(parts.get(name), nn.Module)]


def _forked(device: torch.device) -> Any:
    """Put the global generators back afterwards."""
    devices = [device] if device.type != "cpu" else []
    return torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")


def to_uint8_array(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] to uint8.

    Raises:
        ValueError: for values that are not finite, which would look like black frames.
    """
    if not np.isfinite(frames).all():
        raise ValueError("the model makes frames that are not finite; try --dtype float32")
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
