"""Attention of frames under a mask or over a cache, and to a context that is kept; for diffusers' `WanAttention`."""

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from ..kv_cache import History, KeyValue
from .block_causal import FrameMask, masked_attention
from .rotary import Rotary, apply_rotary


def attend_frames(
    attn: WanAttention, hidden_states: Tensor, rotary_emb: Rotary, context: FrameMask | History | None
) -> tuple[Tensor, KeyValue]:
    """Self-attention of frames.

    Args:
        attn: the layer.
        hidden_states: `[B, tokens, D]`.
        rotary_emb: of the tokens.
        context: which frames see which, or what is cached of the frames before; None lets every frame see every other.

    Returns:
        The layer's output, and the frames' own keys and values without a graph.
    """
    query = apply_rotary(split_heads(attn, attn.norm_q(attn.to_q(hidden_states))), rotary_emb)
    key = apply_rotary(split_heads(attn, attn.norm_k(attn.to_k(hidden_states))), rotary_emb)
    value = split_heads(attn, attn.to_v(hidden_states))
    # Under autocast the norms come out in float32; attention wants one type.
    query, key = query.type_as(value), key.type_as(value)
    own = key.detach(), value.detach()
    if isinstance(context, FrameMask):
        out = masked_attention(query, key, value, context)
    else:
        if context is not None:
            key, value = context.extend(key, value)
        out = attend(attn, query, key, value)
    return project_out(attn, out), own


def attend_context(
    attn: WanAttention, hidden_states: Tensor, context: Tensor, kept: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    """Cross-attention.

    Args:
        attn: the layer.
        hidden_states: `[B, tokens, D]`.
        context: what they attend to, `[B, L, D]`.
        kept: its keys and values if they were made before.

    Returns:
        The layer's output, and the context's keys and values.
    """
    if kept is None:
        key = split_heads(attn, attn.norm_k(attn.to_k(context)))
        value = split_heads(attn, attn.to_v(context))
        kept = key.type_as(value), value
    query = split_heads(attn, attn.norm_q(attn.to_q(hidden_states))).type_as(kept[1])
    return project_out(attn, attend(attn, query, *kept)), kept


def split_heads(attn: WanAttention, states: Tensor) -> Tensor:
    """`[B, tokens, D]` to `[B, tokens, heads, head_dim]`."""
    return states.unflatten(2, (attn.heads, -1))


def project_out(attn: WanAttention, states: Tensor) -> Tensor:
    """Heads put together again, through the layer's output projection."""
    projection, dropout = attn.to_out
    return dropout(projection(states.flatten(2, 3)))


def attend(attn: WanAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without a mask, by the backend that `set_attention_backend` chose."""
    processor: Any = attn.processor
    return dispatch_attention_fn(query, key, value, backend=processor._attention_backend)
