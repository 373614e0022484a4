"""LongCat-Video's network (Meituan LongCat Team 2025, arXiv 2510.22200), which diffusers lacks.

Names of modules and config keys are those of the published checkpoint, meituan-longcat/LongCat-Video, so that it loads
as it is. Block-sparse attention, which the release switches on for its 720p refinement only, is not implemented.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .rotary import Rotary, apply_rotary, clip_table

_EPS = 1e-6
# The hidden size of the feed-forward is rounded up to it, as in the published code.
_FEED_FORWARD_MULTIPLE = 256


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever its weights' type and autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` in any floating type, the result in float32."""
        # Shapes are estimated on the meta device, which has no autocast.
        kind = input.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm that computes in float32 and gives its input's type back."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` in any floating type, the result in the same."""
        weight, bias = (None if value is None else value.float() for value in (self.weight, self.bias))
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).type_as(input)


class HeadRMSNorm(nn.Module):
    """Root-mean-square norm over a head's channels, in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, states: Tensor) -> Tensor:
        """`[..., head_dim]` in any floating type, the result in the same."""
        mean_square = states.float().square().mean(dim=-1, keepdim=True)
        return (states.float() * torch.rsqrt(mean_square + _EPS)).type_as(states) * self.weight


class AttentionBackend:
    """What diffusers' `set_attention_backend` and context parallelism set on an attention module."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over `[B, tokens, heads, head_dim]`, heads flattened in the result."""
        # Under autocast the norms come out in float32; attention wants one type.
        query, key = query.type_as(value), key.type_as(value)
        out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        return out.flatten(2, 3)


class LongCatAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over all tokens of a clip."""

    processor: Any

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HeadRMSNorm(dim // num_heads)
        self.k_norm = HeadRMSNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)
        self.processor = AttentionBackend()

    def forward(self, states: Tensor, rotary: Rotary, num_clean_tokens: int = 0) -> Tensor:
        """Attend.

        Args:
            states: `[B, tokens, D]`.
            rotary: see `LongCatVideoTransformer3DModel.rotary_table`.
            num_clean_tokens: the first tokens, of given frames: they see each other only, the others see all.
        """
        query, key, value = self.qkv(states).unflatten(2, (3, self.heads, -1)).unbind(2)
        query = apply_rotary(self.q_norm(query), rotary)
        key = apply_rotary(self.k_norm(key), rotary)
        if num_clean_tokens == 0:
            return self.proj(self.processor(query, key, value))
        given = slice(num_clean_tokens)
        clean = self.processor(query[:, given], key[:, given], value[:, given])
        noisy = self.processor(query[:, num_clean_tokens:], key, value)
        return self.proj(torch.cat([clean, noisy], dim=1))


class LongCatCrossAttention(nn.Module, AttentionModuleMixin):
    """Attention of a clip's tokens to its text."""

    processor: Any

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.q_norm = HeadRMSNorm(dim // num_heads)
        self.k_norm = HeadRMSNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)
        self.processor = AttentionBackend()

    def forward(self, states: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """Attend from `[B, tokens, D]` to `[B, L, D]`; the mask `[B, L]` is True at tokens to see, None sees all."""
        query = self.q_norm(self.q_linear(states).unflatten(2, (self.heads, -1)))
        key, value = self.kv_linear(text).unflatten(2, (2, self.heads, -1)).unbind(2)
        mask = None if text_mask is None else text_mask[:, None, None]
        return self.proj(self.processor(query, self.k_norm(key), value, mask))


class SwiGLU(nn.Module):
    """The feed-forward network (Shazeer 2020)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        # Two thirds: three matrices then have the parameters that two of the full width would.
        hidden_dim = -(-int(2 * hidden_dim / 3) // _FEED_FORWARD_MULTIPLE) * _FEED_FORWARD_MULTIPLE
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., dim]` to the same."""
        return self.w2(F.silu(self.w1(states)) * self.w3(states))


class LongCatSingleStreamBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; the first and the last are modulated by frame."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, adaln_tembed_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Float32Linear(adaln_tembed_dim, 6 * dim))
        self.mod_norm_attn = Float32LayerNorm(dim, eps=_EPS, elementwise_affine=False)
        self.mod_norm_ffn = Float32LayerNorm(dim, eps=_EPS, elementwise_affine=False)
        self.pre_crs_attn_norm = Float32LayerNorm(dim, eps=_EPS)
        self.attn = LongCatAttention(dim, num_heads)
        self.cross_attn = LongCatCrossAttention(dim, num_heads)
        self.ffn = SwiGLU(dim, int(dim * mlp_ratio))

    def forward(
        self,
        tokens: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        temb: Tensor,
        rotary: Rotary,
        num_clean_frames: int = 0,
    ) -> Tensor:
        """Run the block.

        Args:
            tokens: `[B, frames, tokens per frame, D]`.
            text: `[B, L, D]`.
            text_mask: see `LongCatCrossAttention.forward`.
            temb: embedded time `[B, frames, C]`, or `[B, 1, C]` for all frames, fp32.
            rotary: see `LongCatVideoTransformer3DModel.rotary_table`.
            num_clean_frames: the first frames are given: they see neither the others nor the text.
        """
        modulation = self.adaLN_modulation(temb.float())[:, :, None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=-1)
        sizes = tokens.shape[1:3]

        normed = modulate(self.mod_norm_attn, tokens, shift, scale).flatten(1, 2)
        update = self.attn(normed, rotary, num_clean_frames * sizes[1]).unflatten(1, sizes)
        tokens = (tokens.float() + gate * update.float()).type_as(tokens)

        noisy = tokens[:, num_clean_frames:]
        update = self.cross_attn(self.pre_crs_attn_norm(noisy).flatten(1, 2), text, text_mask)
        noisy = noisy + update.unflatten(1, noisy.shape[1:3])
        tokens = torch.cat([tokens[:, :num_clean_frames], noisy], dim=1) if num_clean_frames else noisy

        update = self.ffn(modulate(self.mod_norm_ffn, tokens, ffn_shift, ffn_scale))
        return (tokens.float() + ffn_gate * update.float()).type_as(tokens)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through a small network, in float32."""

    def __init__(self, dim: int, frequency_embedding_size: int) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(Float32Linear(frequency_embedding_size, dim), nn.SiLU(), Float32Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """`[B, frames]` to `[B, frames, dim]`."""
        # Cosines first, and frequencies that fall from 1 to almost 1/10000: the published order and spacing.
        sinusoids = get_timestep_embedding(
            timestep.float().flatten(),
            self.frequency_embedding_size,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
        )
        return self.mlp(sinusoids).unflatten(0, timestep.shape)


class CaptionEmbedder(nn.Module):
    """Text embeddings to the network's width."""

    def __init__(self, caption_channels: int, dim: int) -> None:
        super().__init__()
        self.y_proj = nn.Sequential(nn.Linear(caption_channels, dim), nn.GELU("tanh"), nn.Linear(dim, dim))

    def forward(self, text: Tensor) -> Tensor:
        """`[B, L, caption_channels]` to `[B, L, dim]`."""
        return self.y_proj(text)


class PatchEmbedder(nn.Module):
    """Latent patches to tokens."""

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, C, frames, H, W]` to `[B, frames, tokens per frame, dim]`."""
        return self.proj(latents).flatten(3).permute(0, 2, 3, 1).contiguous()


class FinalLayer(nn.Module):
    """Tokens to patches, modulated by frame, in float32."""

    def __init__(self, dim: int, patch_channels: int, adaln_tembed_dim: int) -> None:
        super().__init__()
        self.norm_final = Float32LayerNorm(dim, eps=_EPS, elementwise_affine=False)
        self.linear = Float32Linear(dim, patch_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Float32Linear(adaln_tembed_dim, 2 * dim))

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        """`[B, frames, tokens per frame, dim]` to `[B, frames, tokens per frame, patch_channels]`, fp32."""
        shift, scale = self.adaLN_modulation(temb.float())[:, :, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final, tokens, shift, scale))


class LongCatVideoTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]  # config_name
    """The network: latents, timesteps and text to a velocity that points from noise to data, the opposite of ours.

    Args:
        in_channels: of the latents.
        out_channels: of the velocity.
        hidden_size: of a token.
        depth: number of blocks.
        num_heads: of attention.
        caption_channels: width of the text embeddings.
        mlp_ratio: the feed-forward's width before it is cut to two thirds.
        adaln_tembed_dim: of the embedded time.
        frequency_embedding_size: of the time's sinusoids.
        patch_size: of a token, in latent frames, rows and columns.
        text_tokens_zero_pad: whether padding of the text is seen, as zeros, or not seen at all. The published network
            sees it, so that the number of text tokens, 512, is a part of its input.
        enable_flashattn3: of the published code, kept for it and without effect here, as are the next two; here
            `set_attention_backend` chooses.
        enable_flashattn2: see `enable_flashattn3`.
        enable_xformers: see `enable_flashattn3`.
        enable_bsa: block-sparse attention; only False is implemented.
        bsa_params: of block-sparse attention, kept for the published code.
        cp_split_hw: of the published code's context parallelism, kept for it.

    Raises:
        ValueError: for block-sparse attention, patches of several frames, or heads that don't fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: Any = ["LongCatSingleStreamBlock"]  # noqa: RUF012
    _repeated_blocks: Any = ["LongCatSingleStreamBlock"]  # noqa: RUF012

    config: Any
    _gradient_checkpointing_func: Any

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        hidden_size: int = 4096,
        depth: int = 48,
        num_heads: int = 32,
        caption_channels: int = 4096,
        mlp_ratio: float = 4,
        adaln_tembed_dim: int = 512,
        frequency_embedding_size: int = 256,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_tokens_zero_pad: bool = False,
        enable_flashattn3: bool = False,
        enable_flashattn2: bool = False,
        enable_xformers: bool = False,
        enable_bsa: bool = False,
        bsa_params: dict[str, Any] | None = None,
        cp_split_hw: list[int] | None = None,
    ) -> None:
        super().__init__()
        _check_config(hidden_size, num_heads, patch_size, enable_bsa=enable_bsa)
        _, rows, columns = patch_size
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, (1, rows, columns))
        self.t_embedder = TimestepEmbedder(adaln_tembed_dim, frequency_embedding_size)
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size)
        self.blocks = nn.ModuleList(
            LongCatSingleStreamBlock(hidden_size, num_heads, mlp_ratio, adaln_tembed_dim) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, rows * columns * out_channels, adaln_tembed_dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_cond_latents: int = 0,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's output `x0 - eps`, fp32.

        Args:
            hidden_states: latents `[B, C, frames, H, W]`.
            timestep: `[B]` or per latent frame `[B, frames]`, 1000 sigma; 0 for frames that are given clean.
            encoder_hidden_states: text `[B, L, caption_channels]`.
            encoder_attention_mask: `[B, L]`, True at real tokens; None takes all for real.
            num_cond_latents: how many frames at the beginning are given clean. They see each other only.
            return_dict: whether the result is wrapped.
        """
        _, _, frames, height, width = hidden_states.shape
        rows, columns = height // self.config.patch_size[1], width // self.config.patch_size[2]
        temb = self.t_embedder(timestep[:, None] if timestep.ndim == 1 else timestep)
        text, text_mask = self.y_embedder(encoder_hidden_states), encoder_attention_mask
        if self.config.text_tokens_zero_pad and text_mask is not None:
            text, text_mask = text * text_mask[..., None].type_as(text), None
        rotary = self.rotary_table(frames, rows, columns, hidden_states.device)
        tokens = self.x_embedder(hidden_states)
        for block in self.blocks:
            arguments = (tokens, text, text_mask, temb, rotary, num_cond_latents)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens = block(*arguments)
        patches = self.final_layer(tokens, temb).unflatten(2, (rows, columns))
        patches = patches.unflatten(4, (*self.config.patch_size[1:], -1))
        output = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def rotary_table(self, frames: int, rows: int, columns: int, device: torch.device) -> Rotary:
        """Cosines and sines of all tokens, each `[1, tokens, 1, head_dim / 2]`, fp32.

        Rows and columns turn a sixth of the head's pairs each, rounded down, time turns the rest.
        """
        head_dim = self.config.hidden_size // self.config.num_heads
        space = 2 * (head_dim // 6)
        return clip_table([range(frames)], rows, columns, (head_dim - 2 * space, space, space), device)


def modulate(norm: nn.Module, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`norm(tokens) (1 + scale) + shift` in float32, in the tokens' type."""
    return (norm(tokens.float()) * (1 + scale) + shift).type_as(tokens)


def _check_config(hidden_size: int, num_heads: int, patch_size: tuple[int, int, int], *, enable_bsa: bool) -> None:
    if enable_bsa:
        raise ValueError(
            "enable_bsa=True: block-sparse attention is not implemented; set enable_bsa to false in the network's "
            "config.json, as it is published, and attention is dense"
        )
    if patch_size[0] != 1:
        raise ValueError(f"patch_size={tuple(patch_size)} patches time; LongCat-Video has 1 there")
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise ValueError(f"hidden_size={hidden_size} does not divide into {num_heads} heads of an even size")
