"""`KVCache`: the keys and values of the frames made so far, as an object that a caller makes, passes and drops."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .transformers.block_causal import visible_history

KeyValue = tuple[Tensor, Tensor]


class KVCache:
    """Self-attention keys and values of every block, preallocated, and the text's keys and values, kept once made.

    Keys are stored after their rotary embedding at absolute frame positions, so that nothing is rotated again. A cache
    belongs to one network's weights and one clip: make a new one, or `reset` it, for the next.

    With `capacity_frames` for the whole clip nothing is ever overwritten but by writing a chunk again. A smaller
    capacity rolls: the sinks stay and the oldest other frames make room. That is for generation without gradients.

    Args:
        num_layers: of the network.
        batch_size: of the clip.
        num_heads: of the network.
        head_dim: of the network.
        tokens_per_frame: per latent frame, after patching.
        capacity_frames: latent frames that have room.
        sink_frames: first frames that a chunk always sees.
        local_window: how many frames before a chunk it sees besides the sinks; None means all.
        device: where it is.
        dtype: what it is stored as.

    Raises:
        ValueError: if the capacity leaves no room beside the sinks.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        tokens_per_frame: int,
        capacity_frames: int,
        sink_frames: int = 0,
        local_window: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if capacity_frames <= sink_frames:
            raise ValueError(
                f"capacity_frames={capacity_frames} must exceed sink_frames={sink_frames}: new frames need room beside "
                "the sinks"
            )
        self.tokens_per_frame = tokens_per_frame
        self.capacity_frames = capacity_frames
        self.sink_frames = sink_frames
        self.local_window = local_window
        self._ring = capacity_frames - sink_frames
        shape = (num_layers, 2, batch_size, capacity_frames * tokens_per_frame, num_heads, head_dim)
        self._entries = torch.zeros(shape, device=device, dtype=dtype)
        self._text: dict[int, KeyValue] = {}
        self._text_source: tuple[Tensor, int] | None = None
        # Per layer, the frames stored, from the first that was not dropped (sinks never are); and how often each slot
        # was written, by which a recomputation notices that its history is no longer what the forward pass read.
        self._kept = [range(0) for _ in range(num_layers)]
        self._writes = [[0] * capacity_frames for _ in range(num_layers)]

    @staticmethod
    def required_bytes(
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        tokens_per_frame: int,
        capacity_frames: int,
        text_length: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """The memory of such a cache, without making it; `text_length` adds the text's keys and values."""
        tokens = capacity_frames * tokens_per_frame + text_length
        return 2 * math.prod((num_layers, batch_size, tokens, num_heads, head_dim)) * dtype.itemsize

    def memory_bytes(self) -> int:
        """The memory that it holds now: all of the frames' and what there is of the text's."""
        tensors = [self._entries, *(part for pair in self._text.values() for part in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def entries(self) -> Tensor:
        """The frames' keys and values, `[layers, 2, B, tokens, heads, head_dim]`."""
        return self._entries

    @property
    def parts(self) -> "tuple[KVCache, ...]":
        """The caches that this one is made of, itself first; a family may keep more than self-attention."""
        return (self,)

    @property
    def num_frames(self) -> int:
        """Latent frames stored so far, counted from the clip's first, dropped ones included."""
        return self._kept[-1].stop

    @property
    def cost_key(self) -> tuple[int | None, ...]:
        """What the cost of a call over the cache depends on, beside its inputs and the place of its chunk."""
        return (self.tokens_per_frame, self.capacity_frames, self.sink_frames, self.local_window, len(self._text))

    def reset(self) -> None:
        """Forget all frames and the text, and keep the memory: for another clip, or after the weights have changed."""
        self._kept = [range(0) for _ in self._kept]
        self._writes = [[count + 1 for count in counts] for counts in self._writes]
        self._text.clear()
        self._text_source = None

    # Frames

    def read(self, layer: int, start_frame: int) -> KeyValue:
        """Keys and values `[B, tokens, heads, head_dim]` of the earlier frames that a chunk at `start_frame` sees.

        Raises:
            ValueError: if one of them has not been stored or was dropped, or gradients are on and the cache has begun
                to drop frames.
        """
        keys, values = self._pieces(layer, self._slots(layer, start_frame))
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def history(self, layer: int, start_frame: int) -> "History":
        """What `read` gives, as a handle that notices when it is read again after the frames were replaced.

        Raises:
            ValueError: as `read` does.
        """
        slots = self._slots(layer, start_frame)
        return History(self, layer, start_frame, slots, self._stamp(layer, slots))

    @torch.no_grad()
    def write(self, layer: int, start_frame: int, key: Tensor, value: Tensor) -> None:
        """Store a chunk's keys and values `[B, tokens, heads, head_dim]` in place.

        Where the chunk, or one before it, is written again, later frames count as not stored any more.

        Raises:
            ValueError: if frames are left out before it, or there is no room for it beside the sinks.
        """
        count, rest = divmod(key.shape[1], self.tokens_per_frame)
        assert rest == 0 and count > 0, f"{key.shape[1]} tokens are no whole frames of {self.tokens_per_frame}"
        frames = range(start_frame, start_frame + count)
        self._check_room(layer, frames)
        for part, slots in self._runs(frames):
            source = self._tokens(range(part.start - start_frame, part.stop - start_frame))
            target = self._tokens(slots)
            self._entries[layer, 0, :, target].copy_(key[:, source])
            self._entries[layer, 1, :, target].copy_(value[:, source])
            for slot in slots:
                self._writes[layer][slot] += 1
        kept = self._kept[layer]
        oldest = kept.start
        if start_frame < oldest:
            # What lies between is gone, unless the chunk begins among the sinks or right after them.
            oldest = start_frame if start_frame > self.sink_frames else 0
        if frames.stop > self.capacity_frames:
            oldest = max(oldest, frames.stop - self._ring)
        self._kept[layer] = range(oldest, frames.stop)

    # Text

    def use_text(self, text: Tensor) -> None:
        """Say which embeddings the coming passes read; other ones than before drop what was made from those."""
        # A tensor changed in place is another text; inference tensors don't count their changes.
        version = 0 if text.is_inference() else text._version
        if self._text_source is None or self._text_source[0] is not text or self._text_source[1] != version:
            self._text.clear()
        self._text_source = (text, version)

    def text(self, layer: int) -> KeyValue | None:
        """The text's keys and values in a block, None if they have not been made or gradients have to reach them."""
        return None if torch.is_grad_enabled() else self._text.get(layer)

    def keep_text(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the text's keys and values of a block."""
        assert not key.requires_grad and not value.requires_grad, "kept text must not hold a graph"
        self._text[layer] = (key, value)

    # Where frames are

    def _check_room(self, layer: int, frames: range) -> None:
        stop = self._kept[layer].stop
        if frames.start > stop:
            raise ValueError(
                f"a chunk that starts at frame {frames.start} can't be stored: the cache ends at frame {stop}; store "
                "chunks in their order"
            )
        needed = frames.stop - max(frames.start, self.sink_frames)
        if needed > self._ring:
            raise ValueError(
                f"a chunk of {len(frames)} frames does not fit beside {self.sink_frames} sinks; make the cache with "
                f"capacity_frames of at least {self.sink_frames + needed}, not {self.capacity_frames}"
            )

    def _slots(self, layer: int, start_frame: int) -> list[range]:
        """Where the visible history of a chunk lies."""
        kept = self._kept[layer]
        if start_frame > kept.stop:
            raise ValueError(
                f"the chunk at frame {start_frame} has no complete history: the cache ends at frame {kept.stop}; run "
                "the chunks before it with store_kv=True first"
            )
        if kept.start and torch.is_grad_enabled():
            raise ValueError(
                "gradients are on and the cache has dropped frames, which a backward pass could need again; make it "
                "with room for the whole clip (rolling=False), or generate under torch.no_grad()"
            )
        history = visible_history(start_frame, local_window=self.local_window, sink_frames=self.sink_frames)
        for frames in history:
            first = max(frames.start, self.sink_frames)
            if first < min(frames.stop, kept.start):
                raise ValueError(
                    f"the chunk at frame {start_frame} sees back to frame {first}, but the cache has dropped what was "
                    f"before frame {kept.start}; make it larger than capacity_frames={self.capacity_frames}"
                )
        return [slots for frames in history for _, slots in self._runs(frames)]

    def _runs(self, frames: range) -> list[tuple[range, range]]:
        """Frames in order as runs that lie in consecutive slots, and those slots.

        Sinks have slots of their own, all other frames take turns in a ring of the rest.
        """
        runs, first = [], frames.start
        while first < frames.stop:
            if first < self.sink_frames:
                slot, end = first, self.sink_frames
            else:
                slot, end = self.sink_frames + (first - self.sink_frames) % self._ring, self.capacity_frames
            count = min(frames.stop - first, end - slot)
            runs.append((range(first, first + count), range(slot, slot + count)))
            first += count
        return runs

    def _tokens(self, frames: range) -> slice:
        return slice(frames.start * self.tokens_per_frame, frames.stop * self.tokens_per_frame)

    def _pieces(self, layer: int, slots: Sequence[range]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of keys and values, at least one each."""
        key, value = self._entries[layer]
        parts = [self._tokens(run) for run in slots] or [slice(0, 0)]
        return [key[:, part] for part in parts], [value[:, part] for part in parts]

    def _stamp(self, layer: int, slots: Sequence[range]) -> int:
        """A number that grows when one of the slots is written."""
        return sum(self._writes[layer][slot] for run in slots for slot in run)


@dataclass(frozen=True)
class History:
    """What one chunk sees of a cache in one block.

    Reading copies, so that no graph holds the cache's own memory. Under gradient checkpointing the block reads again in
    the backward pass. By then later chunks may have been stored, but no other frames in the place of those read before.
    """

    cache: KVCache
    layer: int
    start_frame: int
    slots: Sequence[range]
    stamp: int

    def extend(self, key: Tensor, value: Tensor) -> KeyValue:
        """The history's keys and values followed by the chunk's own, `[B, tokens, heads, head_dim]`, new tensors.

        Raises:
            RuntimeError: if frames of the history were written again since the handle was made.
        """
        if self.cache._stamp(self.layer, self.slots) != self.stamp:
            raise RuntimeError(
                f"the cached history of the chunk at frame {self.start_frame} was replaced between its forward pass "
                "and its recomputation; call backward before the cache is reset or written again from an earlier frame"
            )
        keys, values = self.cache._pieces(self.layer, self.slots)
        return (
            torch.cat([*(piece.to(key.dtype) for piece in keys), key], dim=1),
            torch.cat([*(piece.to(value.dtype) for piece in values), value], dim=1),
        )
