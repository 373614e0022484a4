"""The straight path between data and noise, and the identities between its velocity, data and noise.

`x_t = (1 - sigma) x0 + sigma eps`, `v = d x_t / d sigma = eps - x0`, with sigma in [0, 1] and 1 pure noise
(Lipman et al. 2023; Liu et al. 2023, "rectified flow").
"""

import torch
from torch import Tensor


def broadcast_sigma(sigma: Tensor, like: Tensor) -> Tensor:
    """View sigma `[B]`, or `[B, T]` for one value per latent frame, so that it broadcasts over `[B, C, T, H, W]`.

    Raises:
        ValueError: if sigma has neither shape.
    """
    if sigma.shape == like.shape[:1]:
        return sigma.view(-1, *[1] * (like.ndim - 1))
    if like.ndim == 5 and sigma.shape == (like.shape[0], like.shape[2]):
        return sigma[:, None, :, None, None]
    raise ValueError(
        f"sigma has shape {tuple(sigma.shape)}; latents of shape {tuple(like.shape)} [B, C, T, H, W] need [B] or [B, T]"
    )


def per_frame(sigma: Tensor, like: Tensor) -> Tensor:
    """Sigma `[B]` or `[B, T]` as `[B, T]`, T being the latent frames of `like`, in fp32."""
    return sigma.float() if sigma.ndim == 2 else sigma.float()[:, None].expand(-1, like.shape[2])


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`x_t = (1 - sigma) x0 + sigma eps`, in fp32."""
    s = broadcast_sigma(sigma, x0).float()
    return (1 - s) * x0.float() + s * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """`v = eps - x0`, in fp32."""
    return noise.float() - x0.float()


def velocity_to_x0(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """`x0 = x_t - sigma v`, in fp32."""
    return x_t.float() - broadcast_sigma(sigma, x_t).float() * velocity.float()


def velocity_to_noise(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """`eps = x_t + (1 - sigma) v`, in fp32."""
    return x_t.float() + (1 - broadcast_sigma(sigma, x_t).float()) * velocity.float()


def x0_to_velocity(x_t: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """`v = (x_t - x0) / sigma`, in fp32.

    Raises:
        ValueError: if a sigma is 0, where the velocity can't be told from data alone.
    """
    if bool((sigma <= 0).any()):
        raise ValueError(f"the velocity is undefined at sigma 0, got sigmas down to {sigma.min().item():g}")
    return (x_t.float() - x0.float()) / broadcast_sigma(sigma, x_t).float()


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, `uncond + scale (cond - uncond)` (Ho & Salimans 2022), in fp32.

    Papers that write `cond + w (cond - uncond)` mean `scale = w + 1`.
    """
    return torch.lerp(unconditional.float(), conditional.float(), scale)
