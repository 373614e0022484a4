"""One save on its way to the disk, now or on a thread, until all processes agree that it is complete."""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from fv_distill.export.checkpoint_weights import METADATA_FILE, TENSORS_FILE

from .checkpoint_storage import INCOMPLETE, ChunkWriter, format_bytes
from .durable_files import sync, write_durably


class CheckpointSaveError(ValueError):
    """A checkpoint could not be written; older ones are as they were."""


class PendingSave:
    """A save that is planned on all processes.

    Args:
        accelerator: of the run.
        final: the checkpoint's folder once it is complete.
        writer: planned, with this process's tensors.
        metadata: the text of `metadata.json`.
        in_background: write on a thread.
    """

    def __init__(
        self, accelerator: Accelerator, final: Path, writer: ChunkWriter, metadata: str, *, in_background: bool
    ) -> None:
        self._accelerator = accelerator
        self._final = final
        self._writer = writer
        self._metadata = metadata
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if in_background:
            # A daemon, so that a second Ctrl-C ends the run at once.
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write()

    def is_written(self) -> bool:
        """Whether every process has written its files or failed to; the same answer everywhere. A collective call."""
        is_alive = self._thread is not None and self._thread.is_alive()
        if self._accelerator.num_processes == 1:
            return not is_alive
        return not self._accelerator.gather(torch.tensor([int(is_alive)], device=self._accelerator.device)).any().item()

    def complete(self) -> None:
        """Wait for the files, then make them a checkpoint by renaming their folder; a collective call.

        Raises:
            CheckpointSaveError: on every process, if any failed; what was written is removed.
        """
        if self._thread is not None:
            self._thread.join()
        self._raise_together(self._error)
        error = None
        if self._accelerator.is_main_process:
            try:
                self._commit()
            except OSError as caught:
                error = caught
        self._raise_together(error)

    def _write(self) -> None:
        try:
            self._writer.write()
        except Exception as error:
            # Raised again where all processes meet: one that raised alone would leave the others waiting for it.
            self._error = error

    def _commit(self) -> None:
        partial = self._writer.folder
        write_durably(partial / TENSORS_FILE, self._writer.index)
        write_durably(partial / METADATA_FILE, self._metadata)
        sync(partial)
        replaced = self._final.with_name(f"{self._final.name}.replaced{INCOMPLETE}")
        if self._final.exists():
            self._final.rename(replaced)
        partial.rename(self._final)
        sync(self._final.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _raise_together(self, error: Exception | None) -> None:
        text = None if error is None else f"{type(error).__name__}: {error}"
        everyones = gather_object([(self._accelerator.process_index, text)])
        failed = [(rank, text) for rank, text in everyones if text is not None]
        if not failed:
            return
        # How full it is where it failed, before room is made; the main process knows what all of them write.
        (space,) = broadcast_object_list([self._describe_space() if self._accelerator.is_main_process else None])
        if self._accelerator.is_main_process:
            shutil.rmtree(self._writer.folder, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        numbered = self._accelerator.num_processes > 1
        told = [f"process {rank}: {text}" if numbered else text for rank, text in failed]
        raise _save_error(self._final, "; ".join([*told, space])) from error

    def _describe_space(self) -> str:
        folder = self._final.parent
        free = shutil.disk_usage(folder).free
        return f"it takes {format_bytes(self._writer.total_bytes)}, and {format_bytes(free)} were free in {folder}"


def start_save(
    accelerator: Accelerator,
    final: Path,
    groups: Mapping[str, Mapping[str, Tensor]],
    *,
    metadata: str,
    in_background: bool,
) -> PendingSave:
    """Plan a save and begin to write it beside its final name; a collective call.

    Args:
        accelerator: of the run.
        final: the checkpoint's folder once it is complete.
        groups: tensors by name; they may change as soon as this returns.
        metadata: the text of `metadata.json`.
        in_background: return when the tensors are copied to host memory, and write on a thread.

    Raises:
        CheckpointSaveError: on every process, if there is no room or the place can't be written.
    """
    partial = final.with_suffix(INCOMPLETE)
    writer = ChunkWriter(partial, copy=in_background)
    try:
        writer.plan(groups)
    except CheckpointException as error:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise _save_error(final, reasons(error)) from error
    return PendingSave(accelerator, final, writer, metadata, in_background=in_background)


def reasons(error: CheckpointException) -> str:
    """What failed on which process, without the traces."""
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}))


def _save_error(final: Path, why: str) -> CheckpointSaveError:
    return CheckpointSaveError(
        f"checkpoint {final} could not be written: {why}. Earlier checkpoints are as they were. Make room, lower "
        "training.checkpoint.keep_last (one more than that is on the disk while saving), or go on in another "
        "training.output_dir with --resume-from-checkpoint set to the latest checkpoint"
    )
