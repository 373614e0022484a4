"""A micro-batch on the meta device, as the loader would make it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fv_distill.rollouts.ode import STATES, TIMESTEPS

if TYPE_CHECKING:
    from .estimate import Clip


def meta_conditions(shapes: Mapping[str, Sequence[int]], batch_size: int) -> dict[str, Tensor]:
    """The data columns beside text of these shapes (`ModelBase.condition_shapes`), on the meta device."""
    return {
        name: torch.empty(batch_size, *shape, device="meta", dtype=torch.bool if "mask" in name else torch.float32)
        for name, shape in shapes.items()
    }


def make_meta_batch(clip: "Clip") -> dict[str, Any]:
    """Clips, or paths for a method that learns from those."""
    size = clip.batch_size
    batch: dict[str, Any] = {
        "text_embedding": torch.empty(size, *clip.text, device="meta"),
        "text_mask": torch.ones(size, clip.text[0], dtype=torch.bool, device="meta"),
        "latent_shape": clip.latents,
        "sample_index": list(range(size)),
        "num_bad_rows": 0,
        **meta_conditions(clip.conditions, size),
    }
    if clip.trajectories is None:
        return batch | {"vae_latent": torch.empty(size, *clip.latents, device="meta")}
    sigmas = clip.trajectories.sigmas
    # Methods read which states a path has: these are numbers.
    timesteps = 1000 * torch.tensor(sigmas).expand(size, -1)
    return batch | {STATES: torch.empty(size, len(sigmas), *clip.latents, device="meta"), TIMESTEPS: timesteps}
