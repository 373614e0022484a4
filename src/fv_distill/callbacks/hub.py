"""Pushing the student to the Hub during training and at its end, as `pipeline` says."""

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from rich.markup import escape

from fv_distill.config.schema import PipelineConfig
from fv_distill.console import console
from fv_distill.export.convert import convert
from fv_distill.export.hub import HubError, open_repository, push_checkpoint, push_directory
from fv_distill.export.run_record import run_files
from fv_distill.training.main_process import on_main_process, raise_everywhere, start_in_background

from .base import Callback

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer

# Among the callbacks. No name in a config has a dot in it, so this one is nobody else's.
HUB_CALLBACK = "pipeline.push_to_hub"

# Beside the checkpoints, so that the copies are hard links of one file system.
_SNAPSHOTS = ".pushing"


def check_hub(accelerator: Accelerator, options: PipelineConfig) -> None:
    """Find out before training whether the student can be pushed; that the Hub is away now is no reason not to train.

    Raises:
        ValueError: on every process, if the Hub would refuse.
    """
    assert options.hub_model_id is not None, "checked with the config"
    repo_id = options.hub_model_id

    def check() -> None:
        try:
            open_repository(repo_id, private=options.hub_private)
        except HubError as error:
            if not error.is_temporary:
                raise ValueError(f"pipeline.push_to_hub: {error}") from error
            message = escape(f"pipeline.push_to_hub: {error}. Training starts all the same")
            console.print(f"[yellow]warning:[/yellow] {message}")

    raise_everywhere(accelerator, check)


class HubCallback(Callback):
    """With `every_save` and `checkpoint`, export and push each new checkpoint in the background, on the main process.

    A checkpoint that is completed while the last one is still on its way waits; if it isn't the newest any more by
    then, it is left out. A failure is a warning, and the next checkpoint is the next attempt.

    Args:
        options: the run's `pipeline` section.
    """

    def __init__(self, options: PipelineConfig) -> None:
        assert options.export_dir is not None and options.hub_model_id is not None, "checked with the config"
        self.options = options
        self.export_dir, self.repo_id = options.export_dir, options.hub_model_id
        self._started: Path | None = None
        self._pushed: Path | None = None
        self._future: Future[str] | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Take note of the checkpoint to resume from, which is not new, and remove what a killed run left."""
        if trainer.accelerator.is_main_process:
            self._started = trainer.checkpoints.latest()
            shutil.rmtree(trainer.checkpoints.folder / _SNAPSHOTS, ignore_errors=True)

    def on_training_step_end(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """Look for a new checkpoint. One that is written in the background is complete some steps after its own."""
        if self.options.hub_strategy == "end" or not trainer.accelerator.is_main_process:
            return
        self._collect(trainer)
        newest = trainer.checkpoints.latest()
        if self._future is None and newest is not None and newest != self._started:
            self._started = newest
            snapshot = _snapshot(newest, trainer.checkpoints.folder / _SNAPSHOTS)
            self._future = start_in_background(lambda: self._push(trainer, snapshot), name="push-to-hub")

    def finish(self, trainer: "Trainer") -> None:
        """Push the newest checkpoint if it isn't on the Hub yet; every process has to call this after training.

        After a run that was stopped early, `end` pushes nothing, as the student isn't done.

        Raises:
            HubError: on the main process, if it can't be pushed, saying how to do so later.
        """
        if trainer.stopped_by is None or self.options.hub_strategy != "end":
            on_main_process(trainer.accelerator, lambda: self._finish(trainer), name="push-to-hub")

    def _finish(self, trainer: "Trainer") -> None:
        if self._future is not None:
            # Its failure isn't the end's: what follows pushes something newer, or the same once more.
            self._future.exception()
            self._collect(trainer)
        newest = trainer.checkpoints.latest()
        assert newest is not None, "training ends with a checkpoint"
        if newest != self._pushed:
            console.print(f"pushing to {self.repo_id}", highlight=False, markup=False)
            url = self._push(trainer, newest)
            console.print(f"pushed to {url}", highlight=False, markup=False)

    def _push(self, trainer: "Trainer", checkpoint: Path) -> str:
        """Export a checkpoint, or its snapshot, and upload the export."""
        training = trainer.config.training
        run = run_files(Path(training.output_dir), trainer.config.model_dump(mode="json", by_alias=True))
        options = self.options
        convert(
            checkpoint, self.export_dir, ema=options.ema, overwrite=True, export_format=options.export_format, run=run
        )
        message = f"{checkpoint.name} of {training.loop.max_train_steps}"
        private = self.options.hub_private
        try:
            url = push_directory(self.export_dir, self.repo_id, private=private, commit_message=message)
        except HubError as error:
            later = f"fv-distill push {self.export_dir} {self.repo_id}{' --private' if private else ''}"
            raise HubError(
                f"{error}. The export is complete in {self.export_dir}; `{later}` uploads it",
                is_temporary=error.is_temporary,
            ) from error
        if self.options.hub_strategy == "checkpoint":
            push_checkpoint(checkpoint, self.repo_id)
        return url

    def _collect(self, trainer: "Trainer") -> None:
        """The outcome of a push that has ended."""
        if self._future is None or not self._future.done():
            return
        future, self._future = self._future, None
        assert self._started is not None
        shutil.rmtree(trainer.checkpoints.folder / _SNAPSHOTS, ignore_errors=True)
        if error := future.exception():
            trainer.log.warn(escape(f"{self._started.name} was not pushed: {error}. Training goes on"))
            return
        self._pushed = self._started
        console.print(f"pushed {self._started.name} to {future.result()}", highlight=False, markup=False)


def _snapshot(checkpoint: Path, folder: Path) -> Path:
    """A copy by hard links, which stays when the checkpoint is rotated away and takes no room until then.

    File systems without hard links get none: the push reads the checkpoint itself, and fails if that is removed.
    """
    copy = folder / checkpoint.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return Path(shutil.copytree(checkpoint, copy, copy_function=os.link))
    except (OSError, shutil.Error):
        shutil.rmtree(folder, ignore_errors=True)
        return checkpoint
