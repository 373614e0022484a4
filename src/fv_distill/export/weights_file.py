"""One safetensors file, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def check_output_file(output_file: Path, *, overwrite: bool) -> None:
    """Refuse a name that is no safetensors file's, and to replace a file unasked.

    Raises:
        FileExistsError: if the file exists and `overwrite` is off, or it is a directory.
        ValueError: for another suffix.
    """
    if output_file.suffix != ".safetensors":
        raise ValueError(f"the output {output_file} must be a .safetensors file")
    if output_file.is_dir() or (output_file.exists() and not overwrite):
        raise FileExistsError(f"{output_file} exists; choose another name or replace a file with --overwrite")


def write_weights_file(output_file: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write under a temporary name and rename."""
    output_file.parent.mkdir(parents=True, exist_ok=True)
    partial = output_file.with_name(f".{output_file.name}.incomplete")
    try:
        # The format tag is what transformers and diffusers look for in a file that torch wrote.
        save_file(dict(weights), partial, metadata={"format": "pt"})
        partial.replace(output_file)
    finally:
        partial.unlink(missing_ok=True)
    return output_file
