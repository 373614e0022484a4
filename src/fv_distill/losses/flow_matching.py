"""Flow matching: regression of the velocity (Lipman et al. 2023)."""

import torch
from torch import Tensor


def flow_matching_loss(velocity: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """`mean_b w_b |v_b - target_b|^2 / dim`, in fp32.

    Args:
        velocity: the network's output `[B, ...]`.
        target: `eps - x0`, same shape.
        weight: one weight per sample `[B]`, or per sample and latent frame `[B, T]` for `[B, C, T, H, W]`.

    Raises:
        ValueError: if the shapes don't agree; broadcasting would average over the wrong thing.
    """
    if velocity.shape != target.shape:
        raise ValueError(f"velocity {tuple(velocity.shape)} and target {tuple(target.shape)} differ in shape")
    error = (velocity.float() - target.float()).square()
    if weight is None:
        return error.mean()
    if weight.ndim == 2 and error.ndim == 5:
        per_frame = error.mean(dim=(1, 3, 4))
        return (_checked(weight, per_frame) * per_frame).mean()
    per_sample = error.flatten(1).mean(dim=1)
    return (_checked(weight, per_sample) * per_sample).mean()


@torch.no_grad()
def errors_by_sigma(velocity: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """The unweighted mean squared error behind each noise level, fp32, in the shape of `sigma`: `[B]` or `[B, T]`.

    Args:
        velocity: the network's output `[B, C, T, H, W]`, or `[B, ...]` where `sigma` has one level per sample.
        target: `eps - x0`, same shape.
        sigma: the noise levels.
    """
    error = (velocity.detach().float() - target.float()).square()
    per_level = error.mean(dim=(1, 3, 4)) if sigma.ndim == 2 else error.flatten(1).mean(dim=1)
    if per_level.shape != sigma.shape:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}, expected {tuple(per_level.shape)}")
    return per_level


def _checked(weight: Tensor, error: Tensor) -> Tensor:
    if weight.shape != error.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(error.shape)} (or [B])")
    return weight.float()
