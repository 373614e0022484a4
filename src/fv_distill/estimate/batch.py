"""A micro-batch on the meta device, as the loader would make it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fv_distill.models.base import ModelBase
from fv_distill.rollouts.ode import STATES, TIMESTEPS

if TYPE_CHECKING:
    from .estimate import Clip


def meta_extras(model: ModelBase, batch_size: int, latents: Sequence[int]) -> dict[str, Tensor]:
    """What `Conditioning.extras` holds for clips `[C, T, H, W]` of such a model, on the meta device."""
    return {
        name: torch.empty(batch_size, *shape, device="meta", dtype=torch.bool if "mask" in name else torch.float32)
        for name, shape in model.extra_shapes(latents).items()
    }


def make_meta_batch(clip: "Clip", model: ModelBase) -> dict[str, Any]:
    """Clips, or paths for a method that learns from those, with the conditions that the student's `model` reads."""
    size = clip.batch_size
    batch: dict[str, Any] = {
        "text_embedding": torch.empty(size, *clip.text, device="meta"),
        "text_mask": torch.ones(size, clip.text[0], dtype=torch.bool, device="meta"),
        "latent_shape": clip.latents,
        "sample_index": list(range(size)),
        "num_bad_rows": 0,
        **meta_extras(model, size, clip.latents),
    }
    if clip.trajectories is None:
        return batch | {"vae_latent": torch.empty(size, *clip.latents, device="meta")}
    sigmas = clip.trajectories.sigmas
    # Methods read which states a path has: these are numbers.
    timesteps = 1000 * torch.tensor(sigmas).expand(size, -1)
    return batch | {STATES: torch.empty(size, len(sigmas), *clip.latents, device="meta"), TIMESTEPS: timesteps}
