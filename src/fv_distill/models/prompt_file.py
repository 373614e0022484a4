"""Embeddings of prompts from a file, for text encoders that are too large to run for one or two prompts."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def read_prompt_file(path: str) -> dict[str, Tensor]:
    """Embeddings `[L, D]` by prompt, fp32, of a safetensors file whose tensors have the prompts as their names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a tensor isn't `[L, D]`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompt_embeddings={path!r}: no such file")
    embeddings = {prompt: value.float() for prompt, value in load_file(path).items()}
    for prompt, value in embeddings.items():
        if value.ndim != 2:
            raise ValueError(
                f"prompt_embeddings={path!r}: the embedding of {prompt!r} has shape {tuple(value.shape)}, not [L, D]"
            )
    return embeddings
