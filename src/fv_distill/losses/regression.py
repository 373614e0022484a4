"""Regression on clean latents, the loss of knowledge distillation from teacher trajectories."""

from torch import Tensor


def x0_regression_loss(predicted_x0: Tensor, target_x0: Tensor, *, scale: float = 0.5) -> Tensor:
    """`scale * mean (predicted - target)^2`, in fp32; scale 1 is the plain mean squared error.

    Raises:
        ValueError: if the shapes differ.
    """
    if predicted_x0.shape != target_x0.shape:
        raise ValueError(f"prediction {tuple(predicted_x0.shape)} and target {tuple(target_x0.shape)} differ in shape")
    return scale * (predicted_x0.float() - target_x0.float()).square().mean()
