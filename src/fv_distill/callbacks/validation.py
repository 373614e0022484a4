"""Videos of the student during training, made by a diffusers pipeline."""

import functools
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from fv_distill.config.instantiate import resolve_target
from fv_distill.config.validation import unknown_key
from fv_distill.console import console
from fv_distill.export.call_arguments import (
    needs_image,
    pipeline_of,
    pipeline_target_of,
    takes_image,
    training_call_arguments,
    training_clip_size,
)
from fv_distill.export.guider import set_guider
from fv_distill.export.scheduler import few_step_scheduler_for
from fv_distill.generation import DEFAULT_GUIDANCE, even_sigmas, stream_clip
from fv_distill.models.causal_base import CausalModelBase
from fv_distill.models.conditioning import Conditioning
from fv_distill.prompts import Prompt, read_prompt_rows
from fv_distill.rng import derive_seed, generator_for
from fv_distill.training.sharding import reshard, unwrap

from .base import Callback
from .ema import EMACallback
from .tracker_videos import TRACKERS_WITH_VIDEOS, log_videos
from .video_files import best_suffix, contact_sheet, load_first_frame, preview, write_video

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

# Contact sheets show this many clips, this many frames of each; all clips are written as files.
_SHEET_ROWS = 16
_SHEET_FRAMES = 8
# Trackers get the first clips side by side, with at most this many frames.
_LOGGED_CLIPS = 4
_LOGGED_FRAMES = 48

PROMPTS_FILE = "prompts.json"

Clip = tuple[int, np.ndarray]
"""Index of the prompt, uint8 frames `[F, H, W, 3]`."""


class ValidationCallback(Callback):
    """Every `every_steps` steps, and at the end, generate a clip for each prompt with the averaged weights, if any.

    Prompts are shared out over the processes. Training is not touched: each clip's noise depends on `seed` and the
    prompt's position alone, and the global generators are put back. The pipeline is loaded for it and freed after it.

    Args:
        dataset_file: prompts, one a line (.txt), or strings or rows with `caption` or `prompt` (.json, .jsonl), for an
            image-to-video pipeline also `image`, the path of the first frame, relative to the file.
        pipeline_target: a pipeline class with `from_pretrained` and a call.
        every_steps: how often.
        sampling_steps: step counts to sample with, for many-step models.
        guidance_scale: the pipeline's; None is 1 for a few-step student and the pipeline's own default otherwise.
            A causal student of many steps is streamed with it, over a second cache.
        num_frames: of the clips; None makes clips as long as the training's.
        output_dir: where files go; None is `validation` in the run's directory.
        sampling_timesteps: timesteps falling from 1000 that a few-step model visits; None takes the method's own.
        fps: of the written videos.
        seed: of the noise, the same at every validation.
        pipeline_kwargs: further arguments of the pipeline's call. `height`, `width`, `max_sequence_length` and
            `negative_prompt` are the training's where they are not given.

    Raises:
        FileNotFoundError: if there is no such prompt file, or image.
        ValueError: for a file without prompts, or without images where the pipeline takes them, an argument that the
            pipeline doesn't take, or timesteps that no stock scheduler visits.
    """

    def __init__(
        self,
        dataset_file: str,
        pipeline_target: str = "diffusers.WanPipeline",
        every_steps: int = 100,
        sampling_steps: Sequence[int] = (40,),
        guidance_scale: float | None = None,
        num_frames: int | None = None,
        output_dir: str | None = None,
        sampling_timesteps: Sequence[float] | None = None,
        fps: float = 16,
        seed: int = 0,
        **pipeline_kwargs: Any,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"callbacks.validation.every_steps={every_steps} must be at least 1")
        if not sampling_steps or min(sampling_steps) < 1:
            raise ValueError(f"callbacks.validation.sampling_steps={list(sampling_steps)} must list counts from 1 up")
        rows = read_prompt_rows(Path(dataset_file), name="callbacks.validation.dataset_file")
        self.prompts = [row.text for row in rows]
        self.pipeline_class = resolve_target(pipeline_target)
        self._accepted = _accepted_arguments(self.pipeline_class, pipeline_target, pipeline_kwargs)
        self.images = self._images(rows, pipeline_target, dataset_file)
        self.every_steps = every_steps
        self.sampling_steps = tuple(sampling_steps)
        given = {"guidance_scale": guidance_scale, "num_frames": num_frames}
        self.call = pipeline_kwargs | {key: value for key, value in given.items() if value is not None}
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.sigmas = None if sampling_timesteps is None else tuple(t / 1000 for t in sampling_timesteps)
        self.fps = fps
        self.seed = seed
        self._encoded: Conditioning | None = None
        self._guider_scale: float | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Complete the pipeline's arguments, say where videos go, and fail now if the student can't be sampled."""
        student = trainer.models["student"]
        if not student.reads_text:
            raise ValueError(
                f"callbacks.validation samples prompts, and a {type(student).__name__} reads first frames and "
                "actions instead; leave it out, and sample with `fv-distill export` and `fv-distill generate`"
            )
        if self.sigmas is None:
            self.sigmas = trainer.method.few_step_sigmas
        if isinstance(trainer.models["student"], CausalModelBase):
            self._check_streaming()
        elif self.sigmas is not None:
            few_step_scheduler_for(
                trainer.models["student"].directory, self.sigmas, sample_type=trainer.method.sample_type
            )
        if self.output_dir is None:
            self.output_dir = Path(trainer.config.training.output_dir) / "validation"
        self.call = {key: value for key, value in self._defaults(trainer).items() if self._takes(key)} | self.call
        if not self._takes("guidance_scale"):
            # Such a pipeline's guidance is a component of it.
            self._guider_scale = self.call.pop("guidance_scale", None if self.sigmas is None else 1.0)
        self._check_images(trainer)
        if trainer.accelerator.is_main_process and best_suffix() == ".gif":
            console.print("validation writes .gif files; for .mp4 install fv_distill[video]", highlight=False)
        without = set(trainer.config.training.tracker.trackers) - TRACKERS_WITH_VIDEOS
        if trainer.accelerator.is_main_process and without:
            console.print(
                f"validation videos are logged to {' and '.join(sorted(TRACKERS_WITH_VIDEOS))}, not to "
                f"{', '.join(sorted(without))}; all are in {self.output_dir}",
                highlight=False,
            )

    def on_training_step_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """Validate when it is due."""
        if trainer.step % self.every_steps == 0 or trainer.step == trainer.config.training.loop.max_train_steps:
            self.validate(trainer)

    def validate(self, trainer: "Trainer") -> None:
        """Generate, write and log a clip per prompt for each step count."""
        trainer.callbacks.call("on_validation_begin", trainer)
        network = trainer.models["student"].transformer
        was_training = network.training
        network.eval()
        try:
            with self._averaged(trainer), _global_generators_kept(trainer.accelerator.device), torch.no_grad():
                student = trainer.models["student"]
                is_causal = isinstance(student, CausalModelBase)
                pipeline = None if is_causal else self._build_pipeline(trainer)
                for steps in self.sampling_steps if self.sigmas is None else (len(self.sigmas),):
                    if is_causal:
                        make = functools.partial(self._stream, trainer, steps)
                    else:
                        make = functools.partial(self._sample, trainer, pipeline, steps)
                    self._write(trainer, self._share(trainer, make), steps)
        finally:
            network.train(was_training)
            # A forward without gradients leaves FSDP2's root gathered, and a checkpoint must not be made of that.
            reshard(network)
        trainer.callbacks.call("on_validation_end", trainer)

    def _defaults(self, trainer: "Trainer") -> dict[str, Any]:
        student, data = trainer.models["student"], trainer.config.training.data
        training = training_call_arguments(student.directory, trainer.latent_shape, text_length=data.text_length)
        guidance = student.sampling_arguments(None if self.sigmas is None else 1.0)
        return {**training, **guidance, "negative_prompt": student.negative_prompt}

    def _images(self, rows: Sequence[Prompt], target: str, dataset_file: str) -> list[Path | None]:
        """The first frame of each prompt, where the pipeline takes one."""
        if not takes_image(self.pipeline_class):
            return [None] * len(rows)
        for number, row in enumerate(rows, start=1):
            if row.image is not None and not row.image.is_file():
                raise FileNotFoundError(
                    f"callbacks.validation.dataset_file={dataset_file!r}, row {number}: {row.image} is no file"
                )
        without = [number for number, row in enumerate(rows, start=1) if row.image is None]
        if without and needs_image(self.pipeline_class):
            raise ValueError(
                f"callbacks.validation.dataset_file={dataset_file!r}, row {without[0]} has no `image`, but {target} "
                "makes videos of a first frame; write rows of `caption` and `image` (.json, .jsonl)"
            )
        return [row.image for row in rows]

    def _check_images(self, trainer: "Trainer") -> None:
        """Raise a `ValueError` for a pipeline that shows the student no image, or one that it doesn't look at."""
        student = trainer.models["student"]
        own = pipeline_of(student.directory, student.pipeline_config)
        if own is not None and needs_image(own) != needs_image(self.pipeline_class):
            target = pipeline_target_of(student.directory, student.pipeline_config)
            raise ValueError(
                f"callbacks.validation.pipeline_target: {self.pipeline_class.__name__} is not how a "
                f"{type(student).__name__} is sampled; set it to {target}"
            )

    def _takes(self, key: str) -> bool:
        return self._accepted is None or key in self._accepted

    def _build_pipeline(self, trainer: "Trainer") -> Any:
        student, device = trainer.models["student"], trainer.accelerator.device
        # A text encoder is often larger than the network and shares the device with the training.
        half = {"dtype": {"default": torch.bfloat16, "vae": torch.float32}}
        dtypes = half if trainer.accelerator.mixed_precision == "bf16" else {}
        # Of two experts the other one comes from the directory.
        pipeline = self.pipeline_class.from_pretrained(student.directory, **{student.component: None}, **dtypes)
        if settings := {key: value for key, value in student.pipeline_config.items() if not key.startswith("_")}:
            pipeline.register_to_config(**settings)
        if self.sigmas is not None:
            pipeline.scheduler = few_step_scheduler_for(
                student.directory, self.sigmas, sample_type=trainer.method.sample_type
            )
        if self._guider_scale is not None:
            set_guider(pipeline, self._guider_scale)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(device)
        # Registered last: the pipeline must neither move nor cast the network that is being trained.
        pipeline.register_modules(**{student.component: unwrap(student.transformer)})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _share(self, trainer: "Trainer", make: Callable[[int], np.ndarray]) -> list[Clip]:
        """This process's share of the clips; `make` gives the prompt's at an index, frames in [0, 1]."""
        # Processes that share a clip's tokens make it together.
        count, rank = trainer.groups.num_groups, trainer.groups.group
        clips = []
        # A sharded network has to be called equally often everywhere: short shares repeat a prompt and drop the clip.
        for start in range(0, len(self.prompts), count):
            frames = make(min(start + rank, len(self.prompts) - 1))
            if start + rank < len(self.prompts) and trainer.groups.is_first:
                frames = np.clip(np.nan_to_num(frames), 0, 1)
                clips.append((start + rank, (frames * 255).round().astype(np.uint8)))
        return clips

    def _sample(self, trainer: "Trainer", pipeline: Any, steps: int, index: int) -> np.ndarray:
        """A clip by the pipeline, `[F, H, W, 3]`."""
        # Schedulers that noise afresh draw from the global generator. Seeded like the start's own generator it would
        # give the same noise again.
        torch.manual_seed(derive_seed(self.seed, "validation/fresh_noise", index))
        path = self.images[index]
        # The first argument of a pipeline that takes an image is the image.
        shown: dict[str, Any] = {"prompt": self.prompts[index]}
        if path is not None:
            width, height = training_clip_size(trainer.models["student"].directory, trainer.latent_shape)
            shown["image"] = load_first_frame(path, self.call.get("width", width), self.call.get("height", height))
        result = pipeline(
            **shown,
            num_inference_steps=steps,
            generator=generator_for(self.seed, "validation/start", index),
            output_type="np",
            **self.call,
        )
        return result.frames[0]

    def _stream(self, trainer: "Trainer", steps: int, index: int) -> np.ndarray:
        """A clip by a causal student, chunk by chunk, `[F, H, W, 3]`; a pipeline would show it the future."""
        student = trainer.models["student"]
        assert isinstance(student, CausalModelBase)
        scale = self._streaming_guidance()
        chunks = stream_clip(
            student,
            self._conditioning(student, index),
            trainer.latent_shape,
            sigmas=even_sigmas(steps, student.flow_shift) if self.sigmas is None else self.sigmas,
            sample_type=trainer.method.sample_type,
            context_noise=trainer.method.context_noise,
            key=(self.seed, "validation", index),
            unconditional=None if scale == 1 else student.negative_conditioning(),
            guidance_scale=scale,
        )
        video = student.decode_latents(torch.cat(list(chunks), dim=2))
        return video[0].permute(1, 2, 3, 0).cpu().numpy()

    def _conditioning(self, student: CausalModelBase, index: int) -> Conditioning:
        """One prompt's conditioning; all are encoded on first use, since the encoder takes long to load."""
        if self._encoded is None:
            self._encoded = student.encode_prompts(self.prompts)
        return self._encoded.row(index)

    def _check_streaming(self) -> None:
        """Raise a `ValueError` for an argument that generation chunk by chunk has no use for."""
        if given := sorted(set(self.call) - {"guidance_scale"}):
            raise ValueError(
                f"callbacks.validation.{given[0]}={self.call[given[0]]!r}, but a causal student is streamed in the "
                "training clips' size; remove the key"
            )

    def _streaming_guidance(self) -> float:
        return float(self.call.get("guidance_scale", DEFAULT_GUIDANCE if self.sigmas is None else 1.0))

    def _write(self, trainer: "Trainer", clips: list[Clip], steps: int) -> None:
        assert self.output_dir is not None
        folder = self.output_dir / f"step-{trainer.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, frames in clips:
            write_video(folder / f"{index:03d}_{steps}-steps{best_suffix()}", frames, fps=self.fps)
        shown = [(index, preview(frames, max_frames=_LOGGED_FRAMES)) for index, frames in clips if index < _SHEET_ROWS]
        # Every process has its own share, and only previews are small enough to send whole.
        shown = sorted(gather_object(shown), key=lambda clip: clip[0])
        if trainer.accelerator.is_main_process:
            rows = [preview(frames, max_frames=_SHEET_FRAMES) for _, frames in shown]
            sheet = contact_sheet(rows, [self.prompts[index] for index, _ in shown])
            sheet.save(folder / f"contact_sheet_{steps}-steps.png")
            # The prompt file may change or move; whoever looks at the clips later needs to know what they show.
            (self.output_dir / PROMPTS_FILE).write_text(json.dumps(self.prompts, indent=1, ensure_ascii=False))
            strip = np.concatenate([frames for _, frames in shown[:_LOGGED_CLIPS]], axis=2)
            log_videos(trainer, strip, np.asarray(sheet), suffix=f"{steps}_steps", fps=self.fps)

    @contextmanager
    def _averaged(self, trainer: "Trainer") -> Iterator[None]:
        with ExitStack() as stack:
            if "ema" in trainer.callbacks:
                ema = trainer.callbacks["ema"]
                assert isinstance(ema, EMACallback)
                stack.enter_context(ema.ema_context(trainer.models["student"].transformer))
            yield


def _accepted_arguments(pipeline_class: Any, target: str, given: Mapping[str, Any]) -> set[str] | None:
    """The names that the pipeline's call takes, or None if it takes any.

    Raises:
        ValueError: if one of `given` isn't among them.
    """
    if not hasattr(pipeline_class, "from_pretrained") or not inspect.isfunction(pipeline_class.__call__):
        raise ValueError(
            f"callbacks.validation.pipeline_target={target!r} has no from_pretrained or no call of its own; name the "
            "concrete pipeline, for instance diffusers.WanPipeline"
        )
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    own = set(inspect.signature(ValidationCallback).parameters) - {"pipeline_kwargs"}
    for key in given:
        if key not in parameters:
            raise ValueError(unknown_key(f"callbacks.validation.{key}", sorted(own | set(parameters) - {"self"})))
    return set(parameters)


@contextmanager
def _global_generators_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators of torch, numpy and Python back, from which pipelines may draw."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
