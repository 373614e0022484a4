"""Gradient clipping per role."""

from typing import TYPE_CHECKING, Any

from fv_distill.training.sharding import clip_gradients

from .base import Callback

if TYPE_CHECKING:
    from fv_distill.training.trainer import Trainer


class GradNormClipCallback(Callback):
    """Clip the gradients of each role that steps to a total 2-norm.

    Args:
        max_grad_norm: the largest norm that is left as it is.
        log_grad_norms: log the norm before clipping as `grad_norm/<role>`.

    Raises:
        ValueError: if the norm isn't positive.
    """

    def __init__(self, max_grad_norm: float = 1.0, log_grad_norms: bool = True) -> None:
        if max_grad_norm <= 0:
            raise ValueError(f"callbacks.grad_clip.max_grad_norm={max_grad_norm:g} must be positive")
        self.max_grad_norm = max_grad_norm
        self.log_grad_norms = log_grad_norms

    def on_before_optimizer_step(self, trainer: "Trainer", role: str, metrics: dict[str, Any]) -> None:
        """Clip, and report the norm."""
        norm = clip_gradients(trainer.models[role], self.max_grad_norm)
        if self.log_grad_norms:
            metrics[f"grad_norm/{role}"] = norm
