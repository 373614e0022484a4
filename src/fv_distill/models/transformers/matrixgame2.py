"""Matrix-Game 2 (He et al. 2025, arXiv 2508.13009): Wan 2.1 without text, led by an image, mouse and keyboard.

Written from the paper, the published configs and the published weights' names and shapes; diffusers has no network for
it. Parameters have the names that diffusers gives Wan's, and the action modules' their published ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanImageEmbedding
from torch import Tensor, nn

from ..action_cache import ActionKVCache
from ..kv_cache import KeyValue, KVCache
from .block_causal import ChunkLayout, cached_mask
from .cached_attention import attend_context, attend_frames
from .matrixgame2_action import ActionConfig, ActionModule, Actions, Context
from .rotary import Rotary, clip_table

# Of the 36 input channels (the published configs' in_dim): the mask says which latent frames are given.
MASK_CHANNELS = 4


@dataclass(frozen=True)
class BlockContext:
    """What one block's attentions see besides the frames of the call, and the image if its keys were kept."""

    frames: Context = None
    mouse: Context = None
    keyboard: Context = None
    image: KeyValue | None = None


@dataclass(frozen=True)
class BlockKeys:
    """Keys and values that a block's pass made and that a cache can take; all without a graph."""

    frames: KeyValue
    mouse: KeyValue | None
    keyboard: KeyValue | None
    image: KeyValue | None


class MatrixGame2ConditionEmbedder(nn.Module):
    """Noise level and image."""

    def __init__(self, width: int, *, freq_dim: int, image_dim: int) -> None:
        super().__init__()
        self.timesteps_proj = Timesteps(num_channels=freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=width)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(width, 6 * width)
        self.image_embedder = WanImageEmbedding(image_dim, width)

    def forward(self, timestep: Tensor, image: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
        """Timesteps `[B, n]` to `[B, n, D]` and modulation `[B, n, 6, D]`, and the image's tokens `[B, L, D]`."""
        frequencies = self.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
        temb = self.time_embedder(frequencies.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        modulation = self.time_proj(self.act_fn(temb)).unflatten(-1, (6, -1))
        return temb, modulation, None if image is None else self.image_embedder(image)


class MatrixGame2Block(nn.Module):
    """Self-attention, attention to the image, actions, feed-forward.

    It has no side effects, so that gradient checkpointing may run it twice: what is to be cached is returned.
    """

    def __init__(self, width: int, heads: int, *, ffn_dim: int, eps: float, action: ActionConfig | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = WanAttention(width, heads, width // heads, eps=eps, processor=WanAttnProcessor())
        self.norm2 = FP32LayerNorm(width, eps, elementwise_affine=True)
        self.attn2 = WanAttention(
            width, heads, width // heads, eps=eps, processor=WanAttnProcessor(), is_cross_attention=True
        )
        self.action_model = None if action is None else ActionModule(action)
        self.norm3 = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        image: Tensor | None,
        temb: Tensor,
        rotary_emb: Rotary,
        actions: Actions,
        context: BlockContext,
    ) -> tuple[Tensor, BlockKeys]:
        """Run the block.

        Args:
            hidden_states: `[B, frames, tokens_per_frame, D]`.
            image: embedded image `[B, L, D]`; None leaves it out.
            temb: modulation `[B, frames, 6, D]`, or `[B, 1, 6, D]` for all frames.
            rotary_emb: of the tokens.
            actions: of the frames.
            context: see `BlockContext`.

        Returns:
            Hidden states in the same shape, and what a cache can keep.
        """
        # Of a float32 table, the modulation and all that it touches are float32, as in diffusers' Wan.
        modulation = self.scale_shift_table + temb.float()
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=2)
        sizes = hidden_states.shape[1:3]

        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        attended, frame_keys = attend_frames(self.attn1, normed.flatten(1, 2), rotary_emb, context.frames)
        hidden_states = (hidden_states.float() + attended.unflatten(1, sizes) * gate).type_as(hidden_states)

        image_keys = None
        if image is not None:
            normed = self.norm2(hidden_states.float()).type_as(hidden_states)
            attended, image_keys = attend_context(self.attn2, normed.flatten(1, 2), image, context.image)
            hidden_states = hidden_states + attended.unflatten(1, sizes)

        mouse_keys = keyboard_keys = None
        if self.action_model is not None:
            hidden_states, mouse_keys, keyboard_keys = self.action_model(
                hidden_states, actions, context.mouse, context.keyboard
            )

        normed = (self.norm3(hidden_states.float()) * (1 + ffn_scale) + ffn_shift).type_as(hidden_states)
        hidden_states = (hidden_states.float() + self.ffn(normed).float() * ffn_gate).type_as(hidden_states)
        return hidden_states, BlockKeys(frame_keys, mouse_keys, keyboard_keys, image_keys)


class MatrixGame2Transformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The velocity of a clip's latents, for whole clips or chunk by chunk.

    Set `layout` to choose the chunks of a causal network; without one the whole clip is one chunk.

    Args:
        patch_size: of the tokens; time is not patched.
        num_attention_heads: heads.
        attention_head_dim: their size.
        in_channels: the latents', and with them those of the first frame: a mask of 4 and its latents.
        out_channels: the latents'.
        image_dim: of the image encoder's tokens.
        freq_dim: of the noise level's sines.
        ffn_dim: of the feed-forward networks.
        num_layers: blocks.
        eps: of the norms.
        action_config: see `ActionConfig`.
        local_attn_size: latent frames, its own chunk's included, that a chunk of a published causal network sees; -1
            means all. For information: `layout` is what acts.
        sink_size: first latent frames that such a chunk always sees; likewise.

    Raises:
        ValueError: for a config that patches time, or of actions that don't fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: Any = ["MatrixGame2Block"]  # noqa: RUF012
    _repeated_blocks: Any = ["MatrixGame2Block"]  # noqa: RUF012
    _keep_in_fp32_modules: Any = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]  # noqa: RUF012
    _skip_layerwise_casting_patterns: Any = ["patch_embedding", "condition_embedder", "norm"]  # noqa: RUF012

    # What the mixins give, for the type checker.
    config: Any
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    @register_to_config
    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 36,
        out_channels: int = 16,
        image_dim: int = 1280,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        eps: float = 1e-6,
        action_config: Mapping[str, Any] | None = None,
        local_attn_size: int = -1,
        sink_size: int = 0,
    ) -> None:
        super().__init__()
        if patch_size[0] != 1:
            raise ValueError(f"patch_size={tuple(patch_size)} patches time; Matrix-Game 2 has 1 there")
        width = num_attention_heads * attention_head_dim
        self.actions = ActionConfig.parse(action_config, width=width, num_layers=num_layers)
        self.layout = ChunkLayout()
        kernel = (patch_size[0], patch_size[1], patch_size[2])
        self.patch_embedding = nn.Conv3d(in_channels, width, kernel_size=kernel, stride=kernel)
        self.condition_embedder = MatrixGame2ConditionEmbedder(width, freq_dim=freq_dim, image_dim=image_dim)
        self.blocks = nn.ModuleList(
            MatrixGame2Block(
                width,
                num_attention_heads,
                ffn_dim=ffn_dim,
                eps=eps,
                action=self.actions if layer in self.actions.blocks else None,
            )
            for layer in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, out_channels * kernel[1] * kernel[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        mouse_cond: Tensor | None = None,
        keyboard_cond: Tensor | None = None,
        return_dict: bool = True,
        *,
        layout: ChunkLayout | None = None,
        num_history_frames: int = 0,
        cache: KVCache | None = None,
        start_frame: int = 0,
        store_kv: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity.

        Args:
            hidden_states: latents with those of the first frame, `[B, in_channels, frames, H, W]`; with
                `num_history_frames` a clean copy of the clip's first frames stands before the clip.
            timestep: `[B]`, or per frame `[B, frames]`, 1000 sigma.
            encoder_hidden_states_image: the image encoder's tokens `[B, L, image_dim]`; None leaves the image out.
            mouse_cond: of the whole clip's video frames, from its first, `[B, F, mouse_dim_in]`; None leaves it out.
            keyboard_cond: `[B, F, keyboard_dim_in]`; likewise.
            return_dict: whether the result is wrapped.
            layout: the chunks of this call; None is the network's own.
            num_history_frames: of clean frames, which the clip's chunks see as their past (teacher forcing).
            cache: makes `hidden_states` one chunk that sees what the cache holds before `start_frame`.
            start_frame: where the first frame stands in the clip.
            store_kv: write the chunk's keys and values to the cache.

        Returns:
            The velocity of the frames after the history, `[B, out_channels, frames - num_history_frames, H, W]`.

        Raises:
            ValueError: for a timestep of another shape, actions of too few frames, or what the cache can't serve.
        """
        frames, size = hidden_states.shape[2], hidden_states.shape[3:]
        rows, columns = (length // patch for length, patch in zip(size, self.config.patch_size[1:], strict=True))
        positions = [range(num_history_frames), range(start_frame, start_frame + frames - num_history_frames)]
        rotary = self._rotary(positions, rows, columns, hidden_states.device)
        temb, modulation, image = self.condition_embedder(
            self._timestep(timestep, frames), encoder_hidden_states_image, hidden_states.dtype
        )
        actions = self._windows(mouse_cond, keyboard_cond, positions, hidden_states.device)
        tokens = self.patch_embedding(hidden_states).flatten(3).permute(0, 2, 3, 1).contiguous()
        inputs = (image, modulation, rotary, actions)
        if cache is None:
            layout = self.layout if layout is None else layout
            spans = frames - num_history_frames, num_history_frames
            mask = cached_mask(layout, *spans, tokens.shape[2], tokens.device)
            time_mask = cached_mask(layout, *spans, 1, tokens.device)
            for block in self.blocks:
                tokens, _ = self._call(block, tokens, *inputs, BlockContext(mask, time_mask, time_mask))
        else:
            assert num_history_frames == 0, "a streaming pass takes its history from the cache"
            tokens = self._stream(tokens, inputs, cache, start_frame=start_frame, store=store_kv)
        if temb.shape[1] > 1:
            temb = temb[:, num_history_frames:]
        output = self._read_out(tokens[:, num_history_frames:], temb, rows, columns)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def start_actions_without_effect(self) -> None:
        """Make new action modules change nothing, for training that starts from a network without them."""
        for layer in self.actions.blocks:
            self.get_submodule(f"blocks.{layer}.action_model").start_without_effect()  # type: ignore[operator]

    def _timestep(self, timestep: Tensor, frames: int) -> Tensor:
        if timestep.shape[1:] not in ((), (frames,)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; Matrix-Game 2 takes [B] or one per latent frame, "
                f"[B, {frames}]"
            )
        return timestep[:, None] if timestep.ndim == 1 else timestep

    def _rotary(self, frames: Sequence[range], rows: int, columns: int, device: torch.device) -> Rotary:
        """As in Wan: the head is split between time, height and width, what doesn't divide goes to time."""
        head_dim = self.config.attention_head_dim
        space = 2 * (head_dim // 6)
        return clip_table(frames, rows, columns, (head_dim - 2 * space, space, space), device)

    def _windows(
        self, mouse: Tensor | None, keyboard: Tensor | None, positions: Sequence[range], device: torch.device
    ) -> Actions:
        """The actions that each frame of the call reads."""
        frames = [frame for run in positions for frame in run]
        needed = self.actions.num_actions(frames[-1] + 1)
        for name, value in (("mouse_cond", mouse), ("keyboard_cond", keyboard)):
            if value is not None and value.shape[1] < needed:
                raise ValueError(
                    f"{name} has actions of {value.shape[1]} video frames, but {frames[-1] + 1} latent frames read "
                    f"{needed}; give those of the clip from its first frame"
                )
        index = self.actions.windows(frames, device)
        return Actions(
            None if mouse is None else mouse[:, index],
            None if keyboard is None else keyboard[:, index],
            self.actions.rotary(positions, device),
        )

    def _call(self, block: nn.Module, *args: Any) -> tuple[Tensor, BlockKeys]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _stream(
        self,
        tokens: Tensor,
        inputs: tuple[Tensor | None, Tensor, Rotary, Actions],
        cache: KVCache,
        *,
        start_frame: int,
        store: bool,
    ) -> Tensor:
        """Run the blocks on one chunk over the cache, which is only written between blocks, never inside one."""
        assert isinstance(cache, ActionKVCache), "Matrix-Game 2 streams over a cache of its own adapter's new_cache"
        actions = inputs[-1]
        for layer, block in enumerate(self.blocks):
            parts = _action_caches(cache, layer, actions)
            mouse, keyboard = (None if part is None else part.history(index, start_frame) for part, index in parts)
            context = BlockContext(cache.history(layer, start_frame), mouse, keyboard, cache.text(layer))
            tokens, made = self._call(block, tokens, *inputs, context)
            if store:
                cache.write(layer, start_frame, *made.frames)
                for (part, index), keys in zip(parts, (made.mouse, made.keyboard), strict=True):
                    if part is not None:
                        assert keys is not None
                        part.write(index, start_frame, *keys)
            # Gradients have to reach the image's projections, so that with gradients on nothing is kept.
            if made.image is not None and context.image is None and not torch.is_grad_enabled():
                cache.keep_text(layer, *made.image)
        return tokens

    def _read_out(self, tokens: Tensor, temb: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens `[B, frames, tokens, D]` to latents `[B, C, frames, H, W]`."""
        shift, scale = (self.scale_shift_table + temb[:, :, None].float()).chunk(2, dim=2)
        output = self.proj_out((self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))
        patches = output.unflatten(3, (*self.config.patch_size[1:], -1)).unflatten(2, (rows, columns))
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def beside_first_frame(latents: Tensor, first_frame: Tensor | None, *, start_frame: int = 0) -> Tensor:
    """The network's input: latents, a mask of given frames and the first frame's latents, `[B, 2 C + 4, T, H, W]`.

    Args:
        latents: `[B, C, T, H, W]`.
        first_frame: normalised latents of a video that is the first frame and then grey, from the clip's beginning;
            None says that no frame is given.
        start_frame: where `latents` begin in the clip.

    Raises:
        ValueError: if the first frame's latents end before `latents` do.
    """
    batch, _, frames, height, width = latents.shape
    mask = latents.new_zeros(batch, MASK_CHANNELS, frames, height, width)
    if first_frame is None:
        return torch.cat([latents, mask, torch.zeros_like(latents)], dim=1)
    end = start_frame + frames
    if first_frame.shape[2] < end:
        raise ValueError(
            f"first_frame_latent has {first_frame.shape[2]} latent frames, but the clip goes on to frame {end}; encode "
            "a first frame of the clip's length"
        )
    if start_frame == 0:
        mask[:, :, 0] = 1
    return torch.cat([latents, mask, first_frame[:, :, start_frame:end].to(latents.dtype)], dim=1)


def _action_caches(cache: ActionKVCache, layer: int, actions: Actions) -> tuple[tuple[KVCache | None, int], ...]:
    """The mouse's and the keyboard's cache and the layer's place there; None where a block has no use for it."""
    index = cache.action_layer.get(layer)
    if index is None:
        return ((None, 0), (None, 0))
    return (
        (None if actions.mouse is None else cache.mouse, index),
        (None if actions.keyboard is None else cache.keyboard, index),
    )
