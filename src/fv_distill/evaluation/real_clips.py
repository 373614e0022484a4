"""Real clips as a reference: parquet rows of this library's schema, decoded by the model's VAE."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fv_distill.data.parquet import ParquetDataset
from fv_distill.models.pipeline_index import component_class

from .clips import Batch, Clip
from .sampling import to_uint8_array


class RealClips:
    """The rows of a data set.

    Args:
        data_path: a parquet file or a directory of them, with the column `vae_latent`.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: for rows without clips.
    """

    def __init__(self, data_path: Path) -> None:
        self._path = data_path
        self._rows = ParquetDataset(data_path, tensors=["vae_latent"])
        self._by_caption: dict[str, list[int]] = {}
        for index in range(len(self._rows)):
            caption = self._rows.read(index, check_values=False).scalars["caption"]
            self._by_caption.setdefault(caption, []).append(index)

    @property
    def captions(self) -> list[str]:
        """All different captions, in the order of the rows."""
        return list(self._by_caption)

    def choose(self, prompts: Sequence[str], num_clips: int) -> list[list[int]]:
        """For each prompt up to `num_clips` of its rows.

        Raises:
            ValueError: for a prompt that is no row's caption.
        """
        for prompt in prompts:
            if prompt not in self._by_caption:
                raise ValueError(
                    f"no row of {self._path} has the caption {prompt!r}; models are compared with real clips on the "
                    "clips' own captions: leave the prompts out to take them"
                )
        return [self._by_caption[prompt][:num_clips] for prompt in prompts]

    def latents(self, row: int) -> torch.Tensor:
        """A row's raw latents `[C, T, H, W]`."""
        return self._rows[row]["vae_latent"]


class RealSampler:
    """Decodes chosen rows, as if they were sampled.

    Args:
        clips: the data set.
        rows: the chosen ones; a clip's place in the evaluation is its place among them.
        directory: of the model whose VAE decodes.
        num_frames: frames to keep of each clip; None is all.
        device: where the VAE runs.
        dtype: of the VAE.
    """

    def __init__(
        self,
        clips: RealClips,
        rows: Sequence[int],
        directory: Path,
        *,
        num_frames: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._clips, self._rows, self._num_frames = clips, rows, num_frames
        vae = component_class(directory, "vae").from_pretrained(directory, subfolder="vae", dtype=dtype)
        self._vae: Any = vae.to(device)

    def sample(self, prompts: Sequence[str], indices: Sequence[int]) -> Batch:
        """See `Sampler.sample`."""
        return Batch([Clip(self._decode(self._rows[index]), None, None) for index in indices], None)

    @torch.no_grad()
    def _decode(self, row: int) -> Any:
        latents = self._clips.latents(row)[None].to(self._vae.device, self._vae.dtype)
        video = self._vae.decode(latents, return_dict=False)[0]
        frames = (video[0].float() / 2 + 0.5).permute(1, 2, 3, 0).cpu().numpy()
        return to_uint8_array(frames)[: self._num_frames]
