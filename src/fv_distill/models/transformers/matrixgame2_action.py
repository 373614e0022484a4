"""Matrix-Game 2's action module: what mouse and keyboard do to the frames that follow (He et al. 2025, sec. 3.2).

A latent frame reads the actions of the last `windows_size` latent frames' worth of video frames before its own last
one. The mouse is joined to the tokens, which then attend along time, place by place. The keyboard is what all tokens of
a frame attend to, along time as well. Both are added to the tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from ..kv_cache import History, KeyValue
from .block_causal import FrameMask
from .rotary import Rotary, apply_rotary, axis_table

# Of the published module, which writes it into its constructor and not into the config.
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class ActionConfig:
    """The `action_config` of a published Matrix-Game 2 config, under its own names.

    Attributes:
        blocks: the indices of the transformer's blocks that have a module.
        enable_mouse: whether it reads a mouse.
        enable_keyboard: whether it reads a keyboard.
        mouse_dim_in: numbers per video frame of the mouse: its movement up and to the right.
        keyboard_dim_in: keys.
        hidden_size: of an embedded keyboard state.
        img_hidden_size: of the transformer's tokens.
        mouse_hidden_dim: of the mouse's attention, all heads together.
        keyboard_hidden_dim: of the keyboard's.
        heads_num: of either.
        qk_norm: whether queries and keys are normalised per head.
        qkv_bias: whether the attention's projections have a bias.
        windows_size: latent frames whose actions a latent frame reads.
        vae_time_compression_ratio: video frames per latent frame.
        mouse_qk_dim_list: a head's sizes of the rotary embedding; only the first, of time, turns, for both devices.
        rope_theta: of that embedding.
        rope_dim_list: written by the published configs and read by nothing.
        patch_size: likewise; the transformer's own counts.
    """

    blocks: tuple[int, ...] = ()
    enable_mouse: bool = True
    enable_keyboard: bool = True
    mouse_dim_in: int = 2
    keyboard_dim_in: int = 6
    hidden_size: int = 128
    img_hidden_size: int = 1536
    mouse_hidden_dim: int = 1024
    keyboard_hidden_dim: int = 1024
    heads_num: int = 16
    qk_norm: bool = True
    qkv_bias: bool = False
    windows_size: int = 3
    vae_time_compression_ratio: int = 4
    mouse_qk_dim_list: tuple[int, ...] = (8, 28, 28)
    rope_theta: float = 256
    rope_dim_list: tuple[int, ...] = field(default=(8, 28, 28), repr=False)
    patch_size: tuple[int, ...] = field(default=(1, 2, 2), repr=False)

    @classmethod
    def parse(cls, config: Mapping[str, Any] | None, *, width: int, num_layers: int) -> Self:
        """The config of a network with tokens of size `width`; None or an empty one has no modules.

        Raises:
            ValueError: for an unknown key, blocks that the network lacks, or sizes that don't fit together.
        """
        known = [item.name for item in fields(cls)]
        unknown = [key for key in config or {} if key not in known]
        if unknown:
            raise ValueError(f"action_config has the unknown keys {', '.join(unknown)}; it may have {', '.join(known)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in (config or {}).items()
        }
        parsed = cls(**values)
        if parsed.blocks:
            parsed._check(width, num_layers)
        return parsed

    def _check(self, width: int, num_layers: int) -> None:
        beyond = [block for block in self.blocks if not 0 <= block < num_layers]
        if beyond:
            raise ValueError(f"action_config.blocks names {beyond}, but num_layers={num_layers}")
        if self.img_hidden_size != width:
            raise ValueError(
                f"action_config.img_hidden_size={self.img_hidden_size} must be the tokens' size "
                f"num_attention_heads * attention_head_dim={width}"
            )
        for enabled, key in ((self.enable_mouse, "mouse_hidden_dim"), (self.enable_keyboard, "keyboard_hidden_dim")):
            size = getattr(self, key)
            if enabled and size != self.heads_num * sum(self.mouse_qk_dim_list):
                raise ValueError(
                    f"action_config.{key}={size} must be heads_num={self.heads_num} times the sum of "
                    f"mouse_qk_dim_list={list(self.mouse_qk_dim_list)}"
                )

    @property
    def head_dim(self) -> int:
        """Of either device's attention."""
        return sum(self.mouse_qk_dim_list)

    def num_actions(self, num_latent_frames: int) -> int:
        """Video frames whose actions a clip of so many latent frames can read; of one frame the first action is."""
        return max(1, self.vae_time_compression_ratio * (num_latent_frames - 1))

    def windows(self, frames: Sequence[int], device: torch.device) -> Tensor:
        """For each latent frame the video frames whose actions it reads, `[frames, windows_size * ratio]`.

        Latent frame i ends with video frame 4 i (ratio 4) and reads the twelve actions before that one: it shows what
        they lead to. Before the clip its first action is repeated.
        """
        ratio = self.vae_time_compression_ratio
        last = ratio * torch.tensor(list(frames), device=device)
        offsets = torch.arange(-ratio * self.windows_size, 0, device=device)
        return (last[:, None] + offsets).clamp(min=0)

    def rotary(self, frames: Sequence[range], device: torch.device) -> Rotary:
        """The table of latent frames at absolute positions, `[frames, mouse_qk_dim_list[0] / 2]`."""
        parts = [
            axis_table(run.start, run.stop, self.mouse_qk_dim_list[0], device, float(self.rope_theta)) for run in frames
        ]
        return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])


@dataclass(frozen=True)
class Actions:
    """The actions that each latent frame of a call reads.

    Attributes:
        mouse: `[B, frames, window, mouse_dim_in]`; None leaves the mouse out.
        keyboard: `[B, frames, window, keyboard_dim_in]`; None leaves the keyboard out.
        rotary: see `ActionConfig.rotary`.
    """

    mouse: Tensor | None
    keyboard: Tensor | None
    rotary: Rotary


Context = FrameMask | History | None
"""Which frames see which, or what is cached of the frames before; None lets every frame see every other."""


class HeadNorm(nn.Module):
    """Queries or keys divided by their root mean square.

    Published files hold a weight that the published network doesn't multiply with. It is a buffer here: it is loaded
    and saved under its name, and neither used nor trained.
    """

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(dim))

    def forward(self, states: Tensor) -> Tensor:
        """`[..., dim]`, in the same type."""
        return rms_norm(states.float(), states.shape[-1:], eps=_NORM_EPS).type_as(states)


class ActionModule(nn.Module):
    """See the module's docstring; its submodules have the published names."""

    def __init__(self, config: ActionConfig) -> None:
        super().__init__()
        self.config = config
        window = config.windows_size * config.vae_time_compression_ratio
        width, bias = config.img_hidden_size, config.qkv_bias
        if config.enable_mouse:
            size = config.mouse_hidden_dim
            self.mouse_mlp = nn.Sequential(
                nn.Linear(window * config.mouse_dim_in + width, size),
                nn.GELU(approximate="tanh"),
                nn.Linear(size, size),
                nn.LayerNorm(size),
            )
            self.t_qkv = nn.Linear(size, 3 * size, bias=bias)
            self.img_attn_q_norm = self._norm()
            self.img_attn_k_norm = self._norm()
            self.proj_mouse = nn.Linear(size, width, bias=bias)
        if config.enable_keyboard:
            size, hidden = config.keyboard_hidden_dim, config.hidden_size
            self.keyboard_embed = nn.Sequential(
                nn.Linear(config.keyboard_dim_in, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
            self.mouse_attn_q = nn.Linear(width, size, bias=bias)
            self.keyboard_attn_kv = nn.Linear(window * hidden, 2 * size, bias=bias)
            self.key_attn_q_norm = self._norm()
            self.key_attn_k_norm = self._norm()
            self.proj_keyboard = nn.Linear(size, width, bias=bias)

    def _norm(self) -> nn.Module:
        return HeadNorm(self.config.head_dim) if self.config.qk_norm else nn.Identity()

    def start_without_effect(self) -> None:
        """Zero the projections back to the tokens, so that an untrained module changes nothing."""
        for device, name in ((self.config.enable_mouse, "proj_mouse"), (self.config.enable_keyboard, "proj_keyboard")):
            if device:
                for parameter in self.get_submodule(name).parameters():
                    nn.init.zeros_(parameter)

    def forward(
        self, hidden_states: Tensor, actions: Actions, mouse_context: Context, keyboard_context: Context
    ) -> tuple[Tensor, KeyValue | None, KeyValue | None]:
        """Add what the actions do.

        Args:
            hidden_states: `[B, frames, tokens_per_frame, D]`.
            actions: of the same frames.
            mouse_context: for the mouse's attention, whose cache has one token per frame and clips times places.
            keyboard_context: for the keyboard's, whose cache has one token per frame.

        Returns:
            Hidden states in the same shape, and the frames' own keys and values of mouse and keyboard without a graph.
        """
        mouse = keyboard = None
        if self.config.enable_mouse and actions.mouse is not None:
            added, mouse = self._move(hidden_states, actions.mouse, actions.rotary, mouse_context)
            hidden_states = hidden_states + added
        if self.config.enable_keyboard and actions.keyboard is not None:
            added, keyboard = self._press(hidden_states, actions.keyboard, actions.rotary, keyboard_context)
            hidden_states = hidden_states + added
        return hidden_states, mouse, keyboard

    def _move(self, hidden_states: Tensor, mouse: Tensor, rotary: Rotary, context: Context) -> tuple[Tensor, KeyValue]:
        """Tokens joined with the mouse attend along time, each place for itself."""
        batch, _, places, _ = hidden_states.shape
        window = mouse.type_as(hidden_states).flatten(2)[:, :, None].expand(-1, -1, places, -1)
        joined = self.mouse_mlp(torch.cat([hidden_states, window], dim=-1))
        # [B, T, places, 3 * size] to three of [B * places, T, heads, head_dim].
        parts = self.t_qkv(joined).unflatten(-1, (3, self.config.heads_num, -1)).transpose(1, 2).flatten(0, 1)
        query, key, value = parts.unbind(2)
        query = _turn(self.img_attn_q_norm(query), rotary).type_as(value)
        key = _turn(self.img_attn_k_norm(key), rotary).type_as(value)
        own = key.detach(), value.detach()
        out = _attend_in_time(query, key, value, context, places=1)
        out = out.flatten(2).unflatten(0, (batch, places)).transpose(1, 2)
        return self.proj_mouse(out), own

    def _press(
        self, hidden_states: Tensor, keyboard: Tensor, rotary: Rotary, context: Context
    ) -> tuple[Tensor, KeyValue]:
        """Tokens attend to the keyboard of the frames that they see."""
        _, frames, places, _ = hidden_states.shape
        heads = self.config.heads_num
        window = self.keyboard_embed(keyboard.type_as(hidden_states)).flatten(2)
        key, value = self.keyboard_attn_kv(window).unflatten(-1, (2, heads, -1)).unbind(2)
        query = self.key_attn_q_norm(self.mouse_attn_q(hidden_states).unflatten(-1, (heads, -1)))
        cos, sin = rotary
        query = _turn(query.flatten(1, 2), (_repeat(cos, places), _repeat(sin, places))).type_as(value)
        key = _turn(self.key_attn_k_norm(key), rotary).type_as(value)
        own = key.detach(), value.detach()
        out = _attend_in_time(query, key, value, context, places=places)
        return self.proj_keyboard(out.flatten(2).unflatten(1, (frames, places))), own


def _repeat(table: Tensor, times: int) -> Tensor:
    return table.repeat_interleave(times, dim=0)


def _turn(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first part of `[B, tokens, heads, head_dim]` by time; the parts of height and width stand still."""
    cos, sin = (table[:, None] for table in rotary)
    turning = 2 * cos.shape[-1]
    return torch.cat([apply_rotary(states[..., :turning], (cos, sin)), states[..., turning:]], dim=-1)


def _attend_in_time(query: Tensor, key: Tensor, value: Tensor, context: Context, *, places: int) -> Tensor:
    """Attention of `[B, frames * places, heads, head_dim]` to one key and value per frame.

    Under a mask as a dense one on every device: sequences of a few dozen keys are too short for blocks of a kernel.
    """
    mask = None
    if isinstance(context, FrameMask):
        mask = _repeat(context.frames, places)
    elif context is not None:
        key, value = context.extend(key, value)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
