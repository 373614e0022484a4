"""Distribution matching distillation: the gradient of a KL divergence between student and teacher samples.

Yin et al. 2024, "One-step diffusion with distribution matching distillation", eq. 7 and 8; DMD2 keeps the loss.
"""

import torch
from torch import Tensor

NORMALIZERS = ("per_sample", "batch")

# Below this a sample already equals the teacher's prediction and dividing by the distance would amplify rounding.
NORMALIZER_FLOOR = 1e-6


def dmd_direction(generated: Tensor, *, real_x0: Tensor, fake_x0: Tensor, normalizer: str = "per_sample") -> Tensor:
    """The direction `(fake_x0 - real_x0) / mean |generated - real_x0|` in which the KL divergence grows.

    Args:
        generated: the student's sample `[B, ...]`.
        real_x0: the (guided) teacher's prediction of it from a noised copy, same shape.
        fake_x0: the critic's prediction from the same copy, same shape.
        normalizer: "per_sample" takes the mean over one sample, "batch" over all of them.

    Returns:
        fp32, detached, same shape.

    Raises:
        ValueError: for an unknown normalizer or shapes that differ.
    """
    if not generated.shape == real_x0.shape == fake_x0.shape:
        shapes = [tuple(x.shape) for x in (generated, real_x0, fake_x0)]
        raise ValueError(f"generated, real_x0 and fake_x0 differ in shape: {shapes}")
    with torch.no_grad():
        distance = (generated.float() - real_x0.float()).abs()
        if normalizer == "per_sample":
            scale = distance.mean(dim=tuple(range(1, distance.ndim)), keepdim=True)
        elif normalizer == "batch":
            scale = distance.mean()
        else:
            raise ValueError(f"unknown normalizer {normalizer!r}; choose one of {', '.join(NORMALIZERS)}")
        return (fake_x0.float() - real_x0.float()) / scale.clamp_min(NORMALIZER_FLOOR)


def dmd_loss(generated: Tensor, *, real_x0: Tensor, fake_x0: Tensor, normalizer: str = "per_sample") -> Tensor:
    """A scalar whose gradient with respect to `generated` is the DMD direction / `generated.numel()`.

    Shapes, options and errors are those of `dmd_direction`.
    """
    direction = dmd_direction(generated, real_x0=real_x0, fake_x0=fake_x0, normalizer=normalizer)
    return direction_loss(generated, direction)


def direction_loss(generated: Tensor, direction: Tensor) -> Tensor:
    """Turn a direction into a loss: `0.5 mse(x, stop(x - direction))` has the gradient `direction / x.numel()`."""
    target = (generated.float() - direction).detach()
    return 0.5 * (generated.float() - target).square().mean()
