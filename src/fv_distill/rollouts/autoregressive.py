"""Chunk-by-chunk sampling over a key-value cache: Self-Forcing's rollout (Huang et al. 2025, alg. 1) and streaming."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fv_distill.models.causal_base import CausalModelBase
from fv_distill.models.conditioning import Conditioning
from fv_distill.models.kv_cache import KVCache
from fv_distill.schedules import flow

from .few_step import few_step_rollout

NoiseForChunk = Callable[[int], Tensor]
"""Chunk -> noise `[B, C, chunk_size, H, W]`."""

NoiseAtChunkStep = Callable[[int, int], Tensor]
"""Chunk, step -> noise `[B, C, chunk_size, H, W]`."""


@dataclass(frozen=True)
class ChunkCall:
    """What the last network call of one chunk was given; the cache that it read holds at least all earlier chunks."""

    x_t: Tensor
    sigma: Tensor
    start_frame: int

    def predict_x0(self, student: CausalModelBase, conditioning: Conditioning, cache: KVCache) -> Tensor:
        """Make the call again, with gradients if they are on."""
        return student.predict_x0_streaming(
            self.x_t, self.sigma, conditioning, cache=cache, start_frame=self.start_frame
        )


@dataclass(frozen=True)
class Rollout:
    """A generated clip, and what it takes to make the last call of any chunk again.

    Attributes:
        x0: the clip, fp32 `[B, C, T, H, W]`.
        calls: the last call of each chunk.
        cache: the keys and values of all chunks but the last.
    """

    x0: Tensor
    calls: tuple[ChunkCall, ...]
    cache: KVCache


@dataclass(frozen=True)
class StreamingGuidance:
    """Classifier-free guidance chunk by chunk: the unconditional pass has a history, and so a cache, of its own."""

    unconditional: Conditioning
    scale: float
    cache: KVCache


class _Chunk:
    """One chunk's place in a causal student, called like a whole network; remembers its last call."""

    def __init__(
        self,
        student: CausalModelBase,
        cache: KVCache,
        start_frame: int,
        guidance: StreamingGuidance | None = None,
    ) -> None:
        self._student, self._cache, self._start_frame, self._guidance = student, cache, start_frame, guidance
        self.call: ChunkCall | None = None

    def predict_velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.call = ChunkCall(x_t, sigma, self._start_frame)
        velocity = self._student.predict_velocity_streaming(
            x_t, sigma, conditioning, cache=self._cache, start_frame=self._start_frame
        )
        if self._guidance is None:
            return velocity
        unguided = self._student.predict_velocity_streaming(
            x_t, sigma, self._guidance.unconditional, cache=self._guidance.cache, start_frame=self._start_frame
        )
        return flow.guide(velocity, unguided, self._guidance.scale)


def autoregressive_rollout(
    student: CausalModelBase,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    *,
    exit_steps: Sequence[int],
    sample_type: str,
    fresh_noise: NoiseAtChunkStep,
    context_noise: float = 0.0,
    context_fresh_noise: NoiseForChunk | None = None,
    grad: bool = False,
    start_gradient_frame: int = 0,
) -> Rollout:
    """Generate a clip as streaming does, each chunk from noise down to its exit step.

    A finished chunk passes through the network once more, without gradients, to store its keys and values; nobody reads
    those of the last chunk, so it is spared that. Gradients, where asked for, flow through each chunk's last call only:
    the history is a constant.

    Args:
        student: the causal few-step network.
        noise: where each chunk starts, `[B, C, T, H, W]`, at sigma 1.
        conditioning: of the batch.
        sigmas: the student's levels, falling from 1, without the final 0.
        exit_steps: for each chunk the index into `sigmas` of its last call.
        sample_type: "sde" or "ode", see `few_step_rollout`.
        fresh_noise: for the transition out of a step of a chunk; only called for "sde".
        context_noise: the level in [0, 1) at which a finished chunk is stored; 0 stores it clean.
        context_fresh_noise: the noise for that; needed for a level above 0.
        grad: whether each chunk's last call builds a graph.
        start_gradient_frame: chunks that start before this latent frame build none.
    """
    size = student.chunk_size
    starts = range(0, noise.shape[2], size)
    assert len(exit_steps) == len(starts), f"{len(exit_steps)} exit steps for {len(starts)} chunks"
    cache = student.new_cache(noise.shape[0], noise.shape[1:])
    clean, calls = [], []
    for index, start in enumerate(starts):
        chunk = _Chunk(student, cache, start)
        x0 = few_step_rollout(
            chunk,
            noise[:, :, start : start + size],
            conditioning,
            sigmas,
            exit_step=exit_steps[index],
            sample_type=sample_type,
            fresh_noise=functools.partial(fresh_noise, index),
            grad=grad and start >= start_gradient_frame,
        )
        assert chunk.call is not None
        calls.append(chunk.call)
        clean.append(x0)
        if start != starts[-1]:
            context = None if context_fresh_noise is None or context_noise == 0 else context_fresh_noise(index)
            store_context(student, x0.detach(), conditioning, cache, start, sigma=context_noise, noise=context)
    return Rollout(torch.cat(clean, dim=2), tuple(calls), cache)


@torch.no_grad()
def store_context(
    student: CausalModelBase,
    x0: Tensor,
    conditioning: Conditioning,
    cache: KVCache,
    start_frame: int,
    *,
    sigma: float = 0.0,
    noise: Tensor | None = None,
) -> None:
    """Store the keys and values of a finished chunk `[B, C, chunk_size, H, W]`, noised to `sigma` if that is not 0."""
    level = torch.full((x0.shape[0],), sigma, device=x0.device)
    if sigma > 0:
        assert noise is not None, "a noised context needs noise"
        x0 = flow.add_noise(x0, noise, level)
    student.predict_velocity_streaming(x0, level, conditioning, cache=cache, start_frame=start_frame, store_kv=True)


@torch.no_grad()
def stream_chunks(
    student: CausalModelBase,
    noise: NoiseForChunk,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    *,
    num_chunks: int,
    cache: KVCache,
    sample_type: str,
    fresh_noise: NoiseAtChunkStep,
    context_noise: float = 0.0,
    context_fresh_noise: NoiseForChunk | None = None,
    guidance: StreamingGuidance | None = None,
) -> Iterator[Tensor]:
    """Clean chunks `[B, C, chunk_size, H, W]`, fp32, each as soon as it is done; all of a student's steps for each.

    `cache` comes from `student.new_cache`, a rolling one for long clips. `guidance`, for models of many steps, doubles
    the calls and the cache. The other arguments are those of `autoregressive_rollout`, with noise asked for when it is
    needed.
    """
    for index in range(num_chunks):
        start = index * student.chunk_size
        x0 = few_step_rollout(
            _Chunk(student, cache, start, guidance),
            noise(index),
            conditioning,
            sigmas,
            exit_step=len(sigmas) - 1,
            sample_type=sample_type,
            fresh_noise=functools.partial(fresh_noise, index),
        )
        yield x0
        if index < num_chunks - 1:
            context = None if context_fresh_noise is None or context_noise == 0 else context_fresh_noise(index)
            store_context(student, x0, conditioning, cache, start, sigma=context_noise, noise=context)
            if guidance is not None:
                pair = guidance.unconditional, guidance.cache
                store_context(student, x0, *pair, start, sigma=context_noise, noise=context)
