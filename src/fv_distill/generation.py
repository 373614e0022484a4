"""Video from a causal student, chunk by chunk: each is decoded and handed out as soon as it is denoised."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fv_distill.models
from fv_distill.models.causal_base import CausalModelBase
from fv_distill.models.conditioning import IMAGE_COLUMNS, Conditioning
from fv_distill.models.kv_cache import KVCache
from fv_distill.models.pretrained import load_vae_config, read_vae_factors, resolve_directory
from fv_distill.rng import generator_for
from fv_distill.rollouts.autoregressive import StreamingGuidance, stream_chunks
from fv_distill.schedules.shift import shift_sigma

# Of a causal model that was not distilled, where nobody says another number: WanPipeline's own.
DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 5.0


class VideoStreamer:
    """Generates with an export of a causal student.

    Args:
        model: the student.
        sigmas: its noise levels, falling from 1, without the final 0.
        sample_type: "sde" or "ode".
        context_noise: the level at which finished chunks become history.
        latent_shape: `[C, T, H, W]` of the training clips, the default size.
        frames_per_latent: video frames of every latent frame but the first, which is one.
        spatial_factor: pixels per latent pixel.
        guidance_scale: what `stream` takes where it is given none; 1 makes no unconditional pass.
    """

    def __init__(
        self,
        model: CausalModelBase,
        *,
        sigmas: Sequence[float],
        sample_type: str,
        context_noise: float,
        latent_shape: Sequence[int],
        frames_per_latent: int,
        spatial_factor: int,
        guidance_scale: float = 1.0,
    ) -> None:
        self.model = model
        self.sigmas = tuple(sigmas)
        self.sample_type = sample_type
        self.context_noise = context_noise
        self.latent_shape = tuple(latent_shape)
        self.frames_per_latent = frames_per_latent
        self.spatial_factor = spatial_factor
        self.guidance_scale = guidance_scale

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype | None = None,
        num_inference_steps: int | None = None,
    ) -> "VideoStreamer":
        """Load an export of a causal student.

        Args:
            directory: the export, or a Hub id.
            device: where it runs; None takes an accelerator where there is one.
            dtype: of the weights; None is bfloat16 on an accelerator and float32 on a CPU.
            num_inference_steps: of a model that was not distilled; None is 50.

        Raises:
            FileNotFoundError: if there is no such export.
            ValueError: if it is not causal, or a step count is given for a few-step student.
        """
        directory = resolve_directory(directory)
        info = read_causal_info(directory)
        causal, call = info["causal"], info["call"]
        if device is None:
            device = torch.accelerator.current_accelerator() or "cpu"
        device = torch.device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = _adapter(causal["adapter"]).from_pretrained(
            str(directory),
            chunk_size=causal["chunk_size"],
            local_window=causal["local_window"],
            sink_frames=causal["sink_frames"],
            dtype=dtype,
            # A network without text has none.
            **({"text_length": call["max_sequence_length"]} if "max_sequence_length" in call else {}),
        )
        model.transformer.to(device)
        if info["sigmas"] is not None and num_inference_steps not in (None, len(info["sigmas"])):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, but {directory} was distilled to "
                f"{len(info['sigmas'])} steps"
            )
        factor, spatial = read_vae_factors(directory)
        frames = 1 + (call["num_frames"] - (1 if factor > 1 else 0)) // factor
        return cls(
            model,
            sigmas=info["sigmas"] or even_sigmas(num_inference_steps or DEFAULT_STEPS, model.flow_shift),
            sample_type=info["sample_type"],
            context_noise=causal["context_noise"],
            latent_shape=(
                int(load_vae_config(directory)["z_dim"]),
                frames,
                call["height"] // spatial,
                call["width"] // spatial,
            ),
            frames_per_latent=factor,
            spatial_factor=spatial,
            guidance_scale=DEFAULT_GUIDANCE if info["sigmas"] is None and model.reads_text else 1.0,
        )

    def stream(
        self,
        prompt: str = "",
        *,
        image: Tensor | None = None,
        actions: Mapping[str, Any] | None = None,
        num_frames: int | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        noise: Tensor | None = None,
    ) -> Iterator[np.ndarray]:
        """Frames as they come, uint8 `[f, H, W, 3]`, one array per chunk.

        Args:
            prompt: what to show, for networks that read text.
            image: the first frame, `[3, H, W]` in [0, 1] and of the video's size, for networks that go on from one.
            actions: by data column (`mouse_cond`, `keyboard_cond`) what is done at each frame of the video, `[F, n]`.
            num_frames: of the video; None is the length of the actions, or without any that of the training clips.
                Whole chunks are generated and what is too much is cut off.
            seed: of the noise, which a chunk has whatever the length of the video.
            height: in pixels; None is the training clips'.
            width: in pixels; None is the training clips'.
            guidance_scale: `uncond + scale (cond - uncond)`, at the price of a second pass and a second cache; None is
                1, none, for a distilled student and 5 for others.
            negative_prompt: what the unconditional pass reads.
            noise: where the first chunks start, see `stream_latents`.

        Raises:
            ValueError: for a size that does not divide into the network's patches, noise of another shape, or
                conditions that the network needs and that are missing, or of other sizes.
        """
        if num_frames is None and actions:
            num_frames = min(len(given) for given in actions.values())
        shape, wanted = self.plan(num_frames=num_frames, height=height, width=width)
        conditions = self.encode_conditions(shape, image=image, actions=actions, num_frames=wanted)
        decode = self.model.streaming_decoder()
        done = 0
        options: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
        options |= {"conditions": conditions, "seed": seed, "noise": noise}
        for chunk in self.stream_latents(prompt, shape, **options):
            frames = to_uint8(decode(chunk))[: wanted - done]
            done += len(frames)
            if len(frames):
                yield frames

    def generate(self, prompt: str = "", **options: Any) -> np.ndarray:
        """The whole video, uint8 `[F, H, W, 3]`; options as in `stream`."""
        return np.concatenate(list(self.stream(prompt, **options)))

    def stream_latents(
        self,
        prompt: str,
        latent_shape: Sequence[int],
        *,
        conditions: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Normalised chunks `[1, C, chunk_size, H, W]`; options as in `stream`.

        Args:
            prompt: what to show.
            latent_shape: `[C, T, H, W]`, T in whole chunks; see `plan`.
            conditions: beside text, see `encode_conditions`. They are read anew for every chunk: who writes what a
                player does into `keyboard_cond` before a chunk is asked for, sees it there.
            seed: of all noise that is not given.
            guidance_scale: see `stream`.
            negative_prompt: see `stream`.
            noise: where the first chunks start, `[1, C, t, H, W]` with t in whole chunks, for instance another model's
                starting noise; later chunks and the noise added between steps follow from `seed`.

        Raises:
            ValueError: for noise of another shape, or guidance of a network that reads no text.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1 and not self.model.reads_text:
            raise ValueError(
                f"guidance_scale={scale:g}, but {type(self.model).__name__} reads no text and can't be guided away "
                "from a negative prompt; set it to 1"
            )
        text = self.model.prompt_conditioning(prompt)
        return stream_clip(
            self.model,
            replace(text, extras={**text.extras, **(conditions or {})}),
            latent_shape,
            sigmas=self.sigmas,
            sample_type=self.sample_type,
            context_noise=self.context_noise,
            key=(seed, "generate"),
            unconditional=None if scale == 1 else self.model.prompt_conditioning(negative_prompt),
            guidance_scale=scale,
            noise=noise,
        )

    def encode_conditions(
        self,
        latent_shape: Sequence[int],
        *,
        image: Tensor | None = None,
        actions: Mapping[str, Any] | None = None,
        num_frames: int | None = None,
    ) -> dict[str, Tensor]:
        """What the network reads beside text of a clip, by data column, batch size 1 and on its device.

        Args:
            latent_shape: see `stream_latents`.
            image: see `stream`.
            actions: see `stream`. After their end, in frames that are cut off, the last one goes on.
            num_frames: of the video; None is all frames of the latents.

        Raises:
            ValueError: naming the column that is missing, has another size than the network needs, or that it doesn't
                read.
        """
        self._check_reads(latent_shape, image=image is not None, actions=tuple(actions or ()))
        frames = 1 + (latent_shape[1] - 1) * self.frames_per_latent
        conditions: dict[str, Tensor] = {}
        if image is not None:
            video = image.to(torch.float32)[None, :, None].expand(-1, -1, frames, -1, -1)
            conditions |= self.model.encoders().encode_images(video)
        for name, given in (actions or {}).items():
            rows = torch.as_tensor(given, dtype=torch.float32)
            if len(rows) < (num_frames or frames):
                raise ValueError(f"{name} has {len(rows)} rows, but the video {num_frames or frames} frames")
            index = torch.arange(frames).clamp(max=len(rows) - 1)
            conditions[name] = rows[index][None].to(self.model.device)
        shapes = {name: tuple(value.shape[1:]) for name, value in conditions.items()}
        self.model.check_conditions(shapes, latent_shape)
        return conditions

    def _check_reads(self, latent_shape: Sequence[int], *, image: bool, actions: Sequence[str]) -> None:
        """What is given and not read would look as if it had been."""
        needed, name = self.model.condition_shapes(latent_shape), type(self.model).__name__
        if image and not any(column in needed for column in IMAGE_COLUMNS):
            raise ValueError(f"an image was given, but {name} goes on from none")
        for column in actions:
            if column not in needed:
                raise ValueError(f"{column} was given, but this {name} reads {', '.join(needed) or 'text alone'}")

    def plan(
        self, *, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[tuple[int, ...], int]:
        """The latents `[C, T, H, W]` to generate, in whole chunks, and the video frames to hand out; see `stream`."""
        channels, frames, rows, columns = self.latent_shape
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % self.spatial_factor:
                raise ValueError(f"{name}={size} must be a multiple of {self.spatial_factor}")
        if num_frames is not None:
            if num_frames < 1:
                raise ValueError(f"num_frames={num_frames} must be at least 1")
            frames = 1 + -(-(num_frames - 1) // self.frames_per_latent)
        wanted = num_frames or 1 + (frames - 1) * self.frames_per_latent
        size = self.model.chunk_size
        rows = rows if height is None else height // self.spatial_factor
        columns = columns if width is None else width // self.spatial_factor
        return (channels, -(-frames // size) * size, rows, columns), wanted


def stream_clip(
    model: CausalModelBase,
    conditioning: Conditioning,
    latent_shape: Sequence[int],
    *,
    sigmas: Sequence[float],
    sample_type: str,
    context_noise: float,
    key: Sequence[int | str],
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
) -> Iterator[Tensor]:
    """One clip's normalised chunks `[1, C, chunk_size, H, W]`, with noise from a generator of each chunk's own.

    Args:
        model: the causal student.
        conditioning: of batch size 1.
        latent_shape: `[C, T, H, W]`, T in whole chunks. With a local window the cache's size does not depend on T.
        sigmas: noise levels.
        sample_type: "sde" or "ode".
        context_noise: see `autoregressive_rollout`.
        key: what the noise is derived from.
        unconditional: of batch size 1, needed for a scale other than 1.
        guidance_scale: 1 makes no unconditional pass.
        noise: where the first chunks start, `[1, C, t, H, W]` with t in whole chunks; the others' is drawn.

    Raises:
        ValueError: for noise of another shape.
    """
    channels, frames, height, width = latent_shape
    size = model.chunk_size
    shape = (1, channels, size, height, width)
    if noise is not None:
        _check_noise(noise, latent_shape, size)
    given = [] if noise is None else noise.float().split(size, dim=2)

    def draw(*parts: int | str) -> Tensor:
        return torch.randn(shape, generator=generator_for(*key, *parts)).to(model.device)

    def start(chunk: int) -> Tensor:
        return given[chunk].to(model.device) if chunk < len(given) else draw("start", chunk)

    def new_cache() -> KVCache:
        return model.new_cache(1, latent_shape, rolling=model.local_window is not None)

    guidance = None
    if guidance_scale != 1:
        assert unconditional is not None, "guidance other than 1 needs an unconditional conditioning"
        guidance = StreamingGuidance(unconditional, guidance_scale, new_cache())
    return stream_chunks(
        model,
        start,
        conditioning,
        sigmas,
        num_chunks=frames // size,
        cache=new_cache(),
        sample_type=sample_type,
        fresh_noise=lambda chunk, step: draw("fresh", chunk, step),
        context_noise=context_noise,
        context_fresh_noise=lambda chunk: draw("context", chunk),
        guidance=guidance,
    )


def _check_noise(noise: Tensor, latent_shape: Sequence[int], chunk_size: int) -> None:
    channels, frames, height, width = latent_shape
    found = tuple(noise.shape)
    fits = len(found) == 5 and found == (1, channels, found[2], height, width)
    if not fits or found[2] > frames or found[2] % chunk_size:
        raise ValueError(
            f"noise has shape {found}; it must be [1, {channels}, t, {height}, {width}] with t a multiple of "
            f"chunk_size={chunk_size} up to {frames}"
        )


def even_sigmas(steps: int, flow_shift: float) -> tuple[float, ...]:
    """Evenly spaced levels of a many-step model, shifted once, without the final 0."""
    return tuple(shift_sigma(1 - step / steps, flow_shift) for step in range(steps))


def read_causal_info(directory: Path) -> dict[str, Any]:
    """What the export of a causal student says of itself.

    Raises:
        ValueError: if the directory is no export of a causal student.
    """
    path = directory / "fv_distill.json"
    info = json.loads(path.read_text()) if path.is_file() else {}
    if not info.get("causal"):
        raise ValueError(
            f"{directory} is no export of a causal student ({path.name} has no `causal` entry); sample it with "
            "diffusers.DiffusionPipeline.from_pretrained"
        )
    return info


def _adapter(name: str) -> type[Any]:
    """An adapter class of this library; a file that came from elsewhere must not choose what is imported."""
    kind = getattr(fv_distill.models, name.rpartition(".")[2], None)
    if not (name.startswith("fv_distill.models.") and isinstance(kind, type) and issubclass(kind, CausalModelBase)):
        raise ValueError(f"fv_distill.json names the adapter {name!r}, which is no causal model of fv_distill")
    return kind


def to_uint8(video: Tensor) -> np.ndarray:
    """`[1, 3, f, H, W]` in [0, 1] to `[f, H, W, 3]`."""
    return (video[0].permute(1, 2, 3, 0) * 255).round().to(torch.uint8).cpu().numpy()
