"""Whether the output directory can be written, found out before anything is loaded."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

_PROBE = ".write-test"


def check_output_directory(accelerator: Accelerator, directory: Path) -> None:
    """Write, read and remove a small file from every process; a collective call.

    Raises:
        ValueError: on every process, if one of them can't write there or sees another directory than the main process.
    """
    shared = directory / _PROBE
    error = _attempt(directory, shared) if accelerator.is_main_process else None
    _raise_together(accelerator, directory, error)
    if not accelerator.is_main_process:
        if shared.is_file():
            error = _attempt(directory, directory / f"{_PROBE}-{accelerator.process_index}")
            (directory / f"{_PROBE}-{accelerator.process_index}").unlink(missing_ok=True)
        else:
            error = "it isn't the main process's directory; it has to be shared by all machines"
    _raise_together(accelerator, directory, error)
    if accelerator.is_main_process:
        shared.unlink()


def _attempt(directory: Path, probe: Path) -> str | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return str(error)
    return None


def _raise_together(accelerator: Accelerator, directory: Path, error: str | None) -> None:
    # Each process would otherwise wait for the one that failed.
    failed = [(rank, text) for rank, text in gather_object([(accelerator.process_index, error)]) if text is not None]
    if failed:
        rank, text = failed[0]
        where = f" by process {rank}" if accelerator.num_processes > 1 else ""
        raise ValueError(
            f"training.output_dir={str(directory)!r} can't be written{where}: {text}; make room, allow writing there, "
            "or choose another directory"
        )
