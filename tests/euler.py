"""Sampling with an adapter, as parity tests hold it against the family's pipeline."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from fv_distill.models import Conditioning, ModelBase
from fv_distill.schedules import flow


@torch.no_grad()
def euler(
    model: ModelBase,
    x_t: Tensor,
    sigmas: Iterable[Tensor],
    positive: Conditioning,
    negative: Conditioning | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Guided Euler steps over the pipeline's own sigmas."""
    for sigma, following in pairwise(sigmas):
        velocity = model.predict_velocity(x_t, sigma[None], positive)
        if scale != 1:
            velocity = flow.guide(velocity, model.predict_velocity(x_t, sigma[None], negative), scale)
        x_t = x_t + (following - sigma) * velocity
    return x_t
