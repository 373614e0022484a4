"""Videos of the student during training, made by a diffusers pipeline."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object

from fv_distill.config.instantiate import resolve_target
from fv_distill.console import console
from fv_distill.export.scheduler import few_step_scheduler
from fv_distill.rng import derive_seed
from fv_distill.training.sharding import unwrap

from .base import Callback
from .ema import EMACallback
from .video_files import best_suffix, contact_sheet, encode_gif, write_video

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

# Contact sheets show this many clips; all of them are written as files.
_SHEET_ROWS = 16


class ValidationCallback(Callback):
    """Every `every_steps` steps, and at the end, generate a clip for each prompt with the averaged weights, if any.

    Prompts are shared out over the processes. Training is not touched: the noise comes from a generator of its own, and
    torch's global one is put back.

    Args:
        pipeline_target: a pipeline class with `from_pretrained` and a call.
        dataset_file: prompts, one a line (.txt), or rows with `caption` or `prompt` (.json, .jsonl).
        every_steps: how often.
        sampling_steps: step counts to sample with, for many-step models.
        guidance_scale: the pipeline's; None is 1 for a few-step student and the pipeline's own default otherwise.
        num_frames: of the clips; None is the pipeline's default.
        output_dir: where files go; None is `validation` in the run's directory.
        sampling_timesteps: timesteps falling from 1000 that a few-step model visits; None takes the method's own.
        fps: of the written videos.
        seed: of the noise, the same at every validation.
        pipeline_kwargs: further arguments of the pipeline's call: height, width, max_sequence_length, ...

    Raises:
        FileNotFoundError: if there is no such prompt file.
        ValueError: for a file without prompts, or timesteps that no stock scheduler visits.
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
        self.prompts = read_prompts(Path(dataset_file))
        self.pipeline_class = resolve_target(pipeline_target)
        self.every_steps = every_steps
        self.sampling_steps = tuple(sampling_steps)
        self.guidance_scale = guidance_scale
        self.num_frames = num_frames
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.sigmas = None if sampling_timesteps is None else tuple(t / 1000 for t in sampling_timesteps)
        self.fps = fps
        self.seed = seed
        self.pipeline_kwargs = pipeline_kwargs

    def on_train_start(self, trainer: "Trainer") -> None:
        """Say where videos go, and fail now if the student's steps can't be sampled."""
        if self.sigmas is None:
            self.sigmas = trainer.method.few_step_sigmas
        if self.sigmas is not None:
            few_step_scheduler(self.sigmas, sample_type=trainer.method.sample_type)
        if self.output_dir is None:
            self.output_dir = Path(trainer.config.training.output_dir) / "validation"
        if trainer.accelerator.is_main_process and best_suffix() == ".gif":
            console.print("validation writes .gif files; for .mp4 install fv_distill[video]", highlight=False)

    def on_training_step_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """Validate when it is due."""
        if trainer.step % self.every_steps == 0 or trainer.step == trainer.config.training.loop.max_train_steps:
            self.validate(trainer)

    def validate(self, trainer: "Trainer") -> None:
        """Generate, write and log a clip per prompt for each step count."""
        trainer.callbacks.call("on_validation_begin", trainer)
        student = trainer.models["student"]
        was_training = student.transformer.training
        student.transformer.eval()
        with self._averaged(trainer), _global_generator_kept(trainer.accelerator.device), torch.no_grad():
            pipeline = self._build_pipeline(trainer)
            for steps in self.sampling_steps if self.sigmas is None else (len(self.sigmas),):
                self._write(trainer, self._generate(trainer, pipeline, steps), steps)
        student.transformer.train(was_training)
        trainer.callbacks.call("on_validation_end", trainer)

    def _build_pipeline(self, trainer: "Trainer") -> Any:
        student = trainer.models["student"]
        pipeline = self.pipeline_class.from_pretrained(student.directory, transformer=None)
        if self.sigmas is not None:
            pipeline.scheduler = few_step_scheduler(self.sigmas, sample_type=trainer.method.sample_type)
        for part in ("vae", "text_encoder"):
            getattr(pipeline, part).to(trainer.accelerator.device)
        # Registered last: the pipeline must neither move nor cast the network that is being trained.
        pipeline.register_modules(transformer=unwrap(student.transformer))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _generate(self, trainer: "Trainer", pipeline: Any, steps: int) -> list[tuple[int, np.ndarray]]:
        """This process's share: (prompt index, uint8 frames `[F, H, W, 3]`)."""
        count, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        guidance = self.guidance_scale if self.guidance_scale is not None else (1.0 if self.sigmas else None)
        optional = {"guidance_scale": guidance, "num_frames": self.num_frames}
        call = {key: value for key, value in optional.items() if value is not None} | self.pipeline_kwargs
        clips = []
        # A sharded network has to be called equally often everywhere: short shares repeat a prompt and drop the clip.
        for start in range(0, len(self.prompts), count):
            index = min(start + rank, len(self.prompts) - 1)
            seed = derive_seed(self.seed, "validation", index)
            torch.manual_seed(seed)
            result = pipeline(
                self.prompts[index],
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                **call,
            )
            if start + rank < len(self.prompts):
                clips.append((index, (np.clip(result.frames[0], 0, 1) * 255).round().astype(np.uint8)))
        return clips

    def _write(self, trainer: "Trainer", clips: list[tuple[int, np.ndarray]], steps: int) -> None:
        assert self.output_dir is not None
        folder = self.output_dir / f"step-{trainer.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, frames in clips:
            write_video(folder / f"{index:03d}_{steps}-steps{best_suffix()}", frames, fps=self.fps)
        shown = sorted(gather_object([clip for clip in clips if clip[0] < _SHEET_ROWS]), key=lambda clip: clip[0])
        if trainer.accelerator.is_main_process:
            videos = [frames for _, frames in shown]
            sheet = contact_sheet(videos, [self.prompts[index] for index, _ in shown])
            sheet.save(folder / f"contact_sheet_{steps}-steps.png")
            _log_to_trackers(trainer, videos, np.asarray(sheet), steps, fps=self.fps)

    @contextmanager
    def _averaged(self, trainer: "Trainer") -> Iterator[None]:
        with ExitStack() as stack:
            if "ema" in trainer.callbacks:
                ema = trainer.callbacks["ema"]
                assert isinstance(ema, EMACallback)
                stack.enter_context(ema.ema_context(trainer.models["student"].transformer))
            yield


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .txt, .json or .jsonl file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another kind of file, or one without prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"callbacks.validation.dataset_file={str(path)!r}: no such file")
    text = path.read_text()
    if path.suffix == ".txt":
        prompts = [line.strip() for line in text.splitlines()]
    elif path.suffix in (".json", ".jsonl"):
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
        rows = rows["data"] if isinstance(rows, dict) and "data" in rows else rows
        prompts = [row if isinstance(row, str) else row.get("caption", row.get("prompt", "")) for row in rows]
    else:
        raise ValueError(f"callbacks.validation.dataset_file={str(path)!r} must be a .txt, .json or .jsonl file")
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"callbacks.validation.dataset_file={str(path)!r} holds no prompts")
    return prompts


@contextmanager
def _global_generator_kept(device: torch.device) -> Iterator[None]:
    """Re-noising schedulers draw from torch's global generator; put it back afterwards."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def _log_to_trackers(
    trainer: "Trainer", videos: Sequence[np.ndarray], sheet: np.ndarray, steps: int, *, fps: float
) -> None:
    """Clips side by side as one video, and the sheet: accelerate's own `log` knows neither."""
    strip = np.concatenate(list(videos[:4]), axis=2)
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            from tensorboard.compat.proto.summary_pb2 import Summary

            # A GIF in an image summary plays in the browser; the writer's add_video would need moviepy.
            image = Summary.Image(height=strip.shape[1], width=strip.shape[2], colorspace=3)
            image.encoded_image_string = encode_gif(strip, fps=fps)
            summary = Summary(value=[Summary.Value(tag=f"validation/video_{steps}_steps", image=image)])
            tracker.writer.file_writer.add_summary(summary, trainer.step)
            tracker.writer.add_image(f"validation/sheet_{steps}_steps", sheet, trainer.step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            video = wandb.Video(strip.transpose(0, 3, 1, 2), fps=round(fps))
            tracker.log(
                {f"validation/video_{steps}_steps": video, f"validation/sheet_{steps}_steps": wandb.Image(sheet)},
                step=trainer.step,
            )
