"""Micro-batches on the meta device, as the loader would make them."""

from typing import TYPE_CHECKING, Any

import torch

from fv_distill.rollouts.ode import STATES, TIMESTEPS

from .simulation import MakeBatch

if TYPE_CHECKING:
    from .estimate import Clip


def batch_maker(clip: "Clip") -> MakeBatch:
    """Batches with clips, or with paths for a method that learns from those."""
    options = clip.trajectories

    def make(index: int) -> dict[str, Any]:
        size = clip.batch_size
        first = index * size
        batch: dict[str, Any] = {
            "text_embedding": torch.empty(size, *clip.text, device="meta"),
            "text_mask": torch.ones(size, clip.text[0], dtype=torch.bool, device="meta"),
            "latent_shape": clip.latents,
            "sample_index": list(range(first, first + size)),
            "num_bad_rows": 0,
        }
        if options is None:
            return batch | {"vae_latent": torch.empty(size, *clip.latents, device="meta")}
        # Read by value: which states a path has is no matter of shapes.
        timesteps = 1000 * torch.tensor(options.sigmas).expand(size, -1)
        states = torch.empty(size, len(options.sigmas), *clip.latents, device="meta")
        return batch | {STATES: states, TIMESTEPS: timesteps}

    return make
