"""A block-causal Wan: diffusers' `WanTransformer3DModel` with another forward pass and the same weights."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from ..kv_cache import History, KeyValue, KVCache
from .block_causal import ChunkLayout, FrameMask, cached_mask
from .cached_attention import attend_context, attend_frames
from .rotary import Rotary, clip_table


@dataclass(frozen=True)
class CachedContext:
    """What one block of a streaming pass reads: the frames before the chunk, and the text if it has been kept."""

    history: History
    text: KeyValue | None


@dataclass(frozen=True)
class ToKeep:
    """What a block's pass made that a cache can take; all without a graph."""

    chunk: KeyValue
    text: KeyValue | None


class CausalWanTransformerBlock(WanTransformerBlock):
    """Diffusers' block with modulation per frame, and self-attention under a mask or over a cache.

    It has no side effects, so that gradient checkpointing may run it twice: what is to be cached is returned.
    """

    def forward(  # type: ignore[override]  # returns what to keep as well
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Rotary,
        context: FrameMask | CachedContext | None = None,
    ) -> tuple[Tensor, ToKeep | None]:
        """Run the block.

        Args:
            hidden_states: `[B, frames, tokens_per_frame, D]`.
            encoder_hidden_states: embedded text `[B, L, D]`.
            temb: modulation `[B, frames, 6, D]`, or `[B, 1, 6, D]` for all frames; it is never spread over tokens.
            rotary_emb: see `CausalWanTransformer3DModel.rotary_table`.
            context: which frames see which, or what is cached; None lets every frame see every other.

        Returns:
            Hidden states in the same shape, and with a cache what it can keep.
        """
        modulation = self.scale_shift_table + temb.float()
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=2)

        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        attended, chunk = self._attend_frames(normed.flatten(1, 2), rotary_emb, context)
        update = attended.unflatten(1, hidden_states.shape[1:3])
        hidden_states = (hidden_states.float() + update * gate).type_as(hidden_states)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        attended, text = self._attend_text(normed.flatten(1, 2), encoder_hidden_states, context)
        hidden_states = hidden_states + attended.unflatten(1, hidden_states.shape[1:3])

        normed = (self.norm3(hidden_states.float()) * (1 + ffn_scale) + ffn_shift).type_as(hidden_states)
        hidden_states = (hidden_states.float() + self.ffn(normed).float() * ffn_gate).type_as(hidden_states)
        return hidden_states, ToKeep(chunk, text) if isinstance(context, CachedContext) else None

    def _attend_frames(
        self, hidden_states: Tensor, rotary_emb: Rotary, context: FrameMask | CachedContext | None
    ) -> tuple[Tensor, KeyValue]:
        """Self-attention, and the frames' own keys and values without a graph."""
        history = context.history if isinstance(context, CachedContext) else context
        return attend_frames(self.attn1, hidden_states, rotary_emb, history)

    def _attend_text(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, context: FrameMask | CachedContext | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Cross-attention, and the text's keys and values where they may be kept.

        Gradients have to reach the text's projections, so that with gradients on they are computed anew.
        """
        attn = self.attn2
        if not isinstance(context, CachedContext) or torch.is_grad_enabled() or attn.add_k_proj is not None:
            return attn(hidden_states, encoder_hidden_states, None, None), None
        return attend_context(attn, hidden_states, encoder_hidden_states, context.text)


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` in which a frame sees its own and earlier chunks only.

    State dict and config are the stock class's, so that directories load into either. Set `layout` to choose the
    chunks; without one the whole clip is one chunk and the network computes what the stock class does.

    Raises:
        ValueError: for a config that patches time, which would put several noise levels into one token.
    """

    _no_split_modules = ["CausalWanTransformerBlock"]  # noqa: RUF012
    _repeated_blocks = ["CausalWanTransformerBlock"]  # noqa: RUF012
    # The stock plan splits the sequence between ranks and would cut through the mask.
    _cp_plan = None

    layout: ChunkLayout
    # What the stock constructor makes, for the type checker.
    config: Any
    rope: Any
    condition_embedder: Any
    patch_embedding: nn.Conv3d
    blocks: nn.ModuleList
    norm_out: nn.Module
    proj_out: nn.Module
    scale_shift_table: nn.Parameter
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    # A config's keys are read from the constructor's signature: show the stock one.
    @functools.wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.convert(cast(nn.Module, self))

    @classmethod
    def convert(cls, network: nn.Module) -> None:
        """Make a stock network one of this class, in place: the same modules and weights, another forward."""
        causal = cast(CausalWanTransformer3DModel, network)
        patch_size = causal.config.patch_size
        if patch_size[0] != 1:
            raise ValueError(f"patch_size={tuple(patch_size)} patches time; a causal Wan needs 1 there")
        causal.__class__ = cls
        causal.layout = ChunkLayout()
        for block in causal.blocks:
            block.__class__ = CausalWanTransformerBlock

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        layout: ChunkLayout | None = None,
        num_history_frames: int = 0,
        cache: KVCache | None = None,
        start_frame: int = 0,
        store_kv: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity; a stock pipeline's call works too, and is then block-causal over its own noisy frames.

        Args:
            hidden_states: latents `[B, C, frames, H, W]`; with `num_history_frames` a clean copy of the clip's first
                frames stands before the clip.
            timestep: `[B]`, or per frame `[B, frames]`, 1000 sigma.
            encoder_hidden_states: text `[B, L, text_dim]`.
            encoder_hidden_states_image: image embeddings of an image-to-video network.
            return_dict: whether the result is wrapped.
            attention_kwargs: must be empty; accepted since pipelines pass it.
            layout: the chunks of this call; None is the network's own.
            num_history_frames: of clean frames, which the clip's chunks see as their past (teacher forcing).
            cache: makes `hidden_states` one chunk that sees what the cache holds before `start_frame`.
            start_frame: where the first frame stands in the clip.
            store_kv: write the chunk's keys and values to the cache.

        Returns:
            The velocity of the frames after the history, `[B, C, frames - num_history_frames, H, W]`.

        Raises:
            ValueError: for a timestep of another shape, or what the cache can't serve.
        """
        if attention_kwargs:
            raise ValueError(f"attention_kwargs={attention_kwargs} has no meaning for a causal Wan; leave it out")
        frames, size = hidden_states.shape[2], hidden_states.shape[3:]
        rows, columns = (length // patch for length, patch in zip(size, self.config.patch_size[1:], strict=True))
        positions = [range(num_history_frames), range(start_frame, start_frame + frames - num_history_frames)]
        rotary = self.rotary_table(positions, rows, columns, hidden_states.device)
        temb, modulation, text = self._embed(timestep, encoder_hidden_states, encoder_hidden_states_image, frames)
        tokens = self.patch_embedding(hidden_states).flatten(3).permute(0, 2, 3, 1).contiguous()
        if cache is None:
            sizes = frames - num_history_frames, num_history_frames, tokens.shape[2], tokens.device
            mask = cached_mask(self.layout if layout is None else layout, *sizes)
            for block in self.blocks:
                tokens, _ = self._call(block, tokens, text, modulation, rotary, mask)
        else:
            assert num_history_frames == 0, "a streaming pass takes its history from the cache"
            tokens = self._stream(tokens, (text, modulation, rotary), cache, start_frame=start_frame, store=store_kv)
        if temb.shape[1] > 1:
            temb = temb[:, num_history_frames:]
        output = self._read_out(tokens[:, num_history_frames:], temb, rows, columns)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def rotary_table(self, frames: Sequence[range], rows: int, columns: int, device: torch.device) -> Rotary:
        """Cosines and sines of all tokens at absolute frame positions, each `[1, tokens, 1, head_dim / 2]`, fp32.

        The stock table ends at `rope_max_seq_len` frames; computed from the same formula, a clip has no end.
        """
        dims = (self.rope.t_dim, self.rope.h_dim, self.rope.w_dim)
        return clip_table(frames, rows, columns, dims, device)

    def _embed(
        self, timestep: Tensor, text: Tensor, image: Tensor | None, frames: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Time `[B, frames or 1, D]`, modulation `[B, frames or 1, 6, D]` and text `[B, L, D]`: diffusers' own."""
        per_frame = timestep.ndim == 2
        if timestep.shape[1:] not in ((), (frames,)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; a causal Wan takes [B] or one per latent frame, "
                f"[B, {frames}], and spreads it over the frame's tokens itself"
            )
        temb, modulation, text, image = self.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=frames if per_frame else None
        )
        if not per_frame:
            temb, modulation = temb[:, None], modulation[:, None]
        if image is not None:
            text = torch.cat([image, text], dim=1)
        return temb, modulation.unflatten(-1, (6, -1)), text

    def _call(self, block: nn.Module, *args: Any) -> tuple[Tensor, ToKeep | None]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _stream(
        self,
        tokens: Tensor,
        conditions: tuple[Tensor, Tensor, Rotary],
        cache: KVCache,
        *,
        start_frame: int,
        store: bool,
    ) -> Tensor:
        """Run the blocks on one chunk over the cache, which is only written between blocks, never inside one."""
        for layer, block in enumerate(self.blocks):
            context = CachedContext(cache.history(layer, start_frame), cache.text(layer))
            tokens, made = self._call(block, tokens, *conditions, context)
            assert made is not None
            if store:
                cache.write(layer, start_frame, *made.chunk)
            if made.text is not None and context.text is None:
                cache.keep_text(layer, *made.text)
        return tokens

    def _read_out(self, tokens: Tensor, temb: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens `[B, frames, tokens, D]` to latents `[B, C, frames, H, W]`."""
        shift, scale = (self.scale_shift_table + temb[:, :, None]).chunk(2, dim=2)
        output = self.proj_out((self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))
        patches = output.unflatten(3, (*self.config.patch_size[1:], -1)).unflatten(2, (rows, columns))
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
