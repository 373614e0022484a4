"""The Wan transformer in the original release's layout, small and plain: what converted weights are compared with.

Written from the Wan technical report (Wan Team 2025, section 4.2) and the published checkpoints' key names. Unlike
diffusers' it knows nothing of pipelines, devices or half precision.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring pairs of features by `angles` `[L, d/2]`; x is `[B, L, heads, d]`."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def position_angles(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """Three-axis rotary angles `[L, head_dim/2]`: height and width have a third of the features each, time the rest."""
    third = 2 * (head_dim // 6)
    per_axis = []
    for axis, features in enumerate((head_dim - 2 * third, third, third)):
        rates = 10000.0 ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
        angles = torch.arange(grid[axis], dtype=torch.float64)[:, None] * rates
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        per_axis.append(angles.view(shape).expand(*grid, -1))
    return torch.cat(per_axis, dim=-1).flatten(0, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, *, image: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = nn.RMSNorm(dim, eps=1e-6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def forward(
        self, x: Tensor, context: Tensor, *, angles: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        q, k = self.split(self.norm_q(self.q(x))), self.split(self.norm_k(self.k(context)))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = self.attend(q, k, self.split(self.v(context)))
        if image is not None:
            y = y + self.attend(q, self.split(self.norm_k_img(self.k_img(image))), self.split(self.v_img(image)))
        return self.o(y)


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, heads: int, *, image: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.self_attn = Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = Attention(dim, heads, image=image)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor | None, angles: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + time).split(1, dim=1)
        y = self.norm1(x) * (1 + scale_a) + shift_a
        x = x + gate_a * self.self_attn(y, y, angles=angles)
        x = x + self.cross_attn(self.norm3(x), text, image=image)
        return x + gate_f * self.ffn(self.norm2(x) * (1 + scale_f) + shift_f)


class ImageEmbedding(nn.Module):
    def __init__(self, image_dim: int, dim: int, *, positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )
        if positions is not None:
            self.emb_pos = nn.Parameter(torch.randn(1, positions, image_dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features + self.emb_pos if hasattr(self, "emb_pos") else features)


class Head(nn.Module):
    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).split(1, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class OriginalWan(nn.Module):
    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        ffn_dim: int,
        num_layers: int,
        in_dim: int,
        out_dim: int,
        text_dim: int,
        freq_dim: int = 256,
        image_dim: int | None = None,
        image_positions: int | None = None,
        patch_size: tuple[int, int, int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        self.patch_size, self.freq_dim, self.out_dim, self.head_dim = patch_size, freq_dim, out_dim, dim // heads
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, stride=patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, heads, image=image_dim is not None) for _ in range(num_layers))
        self.head = Head(dim, out_dim * patch_size[0] * patch_size[1] * patch_size[2])
        if image_dim is not None:
            self.img_emb = ImageEmbedding(image_dim, dim, positions=image_positions)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """x `[B, C, T, H, W]`, timestep `[B]` in [0, 1000], text `[B, L, D]`, image features `[B, N, D]`."""
        half = self.freq_dim // 2
        angles = timestep.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        time = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        tokens = self.patch_embedding(x)
        grid = tuple(tokens.shape[2:])
        tokens = tokens.flatten(2).transpose(1, 2)
        modulation = self.time_projection(time).unflatten(1, (6, -1))
        text = self.text_embedding(text)
        image = None if image is None else self.img_emb(image)
        for block in self.blocks:
            tokens = block(tokens, modulation, text, image, position_angles(grid, self.head_dim))
        patches = self.head(tokens, time).unflatten(1, grid).unflatten(-1, (*self.patch_size, self.out_dim))
        # [B, t, h, w, pt, ph, pw, C] -> [B, C, t pt, h ph, w pw]
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
