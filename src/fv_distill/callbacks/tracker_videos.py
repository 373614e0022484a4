"""Videos in trackers: accelerate's own `log` takes numbers only."""

import io
import tempfile
from typing import TYPE_CHECKING

import numpy as np
from accelerate.tracking import GeneralTracker

from .video_files import encode_gif, enlarge

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

TRACKERS_WITH_VIDEOS = {"tensorboard", "trackio", "wandb"}


def log_videos(trainer: "Trainer", video: np.ndarray, sheet: np.ndarray, *, suffix: str, fps: float) -> None:
    """Log a clip and a contact sheet as `validation/video_<suffix>` and `validation/sheet_<suffix>`.

    Args:
        trainer: whose trackers are used, on the main process.
        video: uint8 `[F, H, W, 3]`.
        sheet: uint8 `[H, W, 3]`.
        suffix: of the names.
        fps: of the video.
    """
    # A GIF plays in the browser. To encode frames tensorboard and wandb would need moviepy, without which the
    # former drops a video with a mere printed line, and trackio would need ffmpeg.
    gif = encode_gif(video, fps=fps)
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            from tensorboard.compat.proto.summary_pb2 import Summary

            height, width = enlarge(video).shape[1:3]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            summary = Summary(value=[Summary.Value(tag=f"validation/video_{suffix}", image=image)])
            tracker.writer.file_writer.add_summary(summary, trainer.step)
            tracker.writer.add_image(f"validation/sheet_{suffix}", sheet, trainer.step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            values = {
                f"validation/video_{suffix}": wandb.Video(io.BytesIO(gif), format="gif"),
                f"validation/sheet_{suffix}": wandb.Image(sheet),
            }
            tracker.log(values, step=trainer.step)
        elif tracker.name == "trackio":
            _log_to_trackio(tracker, gif, sheet, suffix=suffix, step=trainer.step)


def _log_to_trackio(tracker: GeneralTracker, gif: bytes, sheet: np.ndarray, *, suffix: str, step: int) -> None:
    import trackio

    # It takes an encoded video as a file only, which it copies.
    with tempfile.NamedTemporaryFile(suffix=".gif") as file:
        file.write(gif)
        file.flush()
        video = trackio.Video(file.name)
        tracker.log(
            {f"validation/video_{suffix}": video, f"validation/sheet_{suffix}": trackio.Image(sheet)}, step=step
        )
