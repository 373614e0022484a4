"""`CausalModelBase`: a network whose latent frames come in chunks, which adds clean history and streaming."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from fv_distill.schedules import flow

from .base import ModelBase
from .conditioning import Conditioning
from .kv_cache import KVCache
from .transformers.block_causal import ChunkLayout


class CausalModelBase(ModelBase):
    """A network whose latent frames come in chunks that see earlier chunks only; it can stream over a `KVCache`.

    Args:
        transformer: see `ModelBase`.
        chunk_size: latent frames per chunk.
        local_window: latent frames before a chunk that it sees; None means all.
        sink_frames: first latent frames that every chunk sees, also beyond its window.
        kwargs: see `ModelBase`.

    Attributes:
        cache_class: what it streams over.
        network_config: of the network, which tells layers, heads and patches as Wan's does.

    Raises:
        ValueError: for sizes that make no chunks.
    """

    cache_class: ClassVar[type[KVCache]] = KVCache
    network_config: Any

    def __init__(
        self,
        transformer: nn.Module,
        *,
        chunk_size: int = 3,
        local_window: int | None = None,
        sink_frames: int = 0,
        **kwargs: Any,
    ) -> None:
        self.layout = ChunkLayout(chunk_size, local_window, sink_frames)
        super().__init__(transformer, **kwargs)
        self.chunk_size = chunk_size
        self.local_window = local_window
        self.sink_frames = sink_frames
        # Stock pipelines call the network without an adapter, in validation for instance: it knows its chunks itself.
        cast(Any, transformer).layout = self.layout

    @classmethod
    def on_base(cls, base: ModelBase, **kwargs: Any) -> Self:
        """See `ModelBase.on_base`; the other roles, and whoever knows of none, still see whole clips."""
        model = super().on_base(base, **kwargs)
        cast(Any, base.transformer).layout = ChunkLayout()
        return model

    # What a family defines

    @abstractmethod
    def predict_velocity(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        clean_history: Tensor | None = None,
        history_sigma: Tensor | None = None,
    ) -> Tensor:
        """The velocity at `x_t`, all chunks at once, fp32, in the shape of `x_t`.

        Args:
            x_t: `[B, C, T, H, W]`.
            sigma: `[B]`, or `[B, T]` where chunks differ (diffusion forcing, Chen et al. 2024).
            conditioning: of the batch.
            clean_history: `[B, C, T, H, W]`; each chunk of `x_t` then sees itself and the chunks of this clip before
                it, as it will when streaming (teacher forcing). Without it, the chunks of `x_t` before it.
            history_sigma: the noise level `[B]` or `[B, T]` that the history was given; None means clean.

        Raises:
            ValueError: for a history of another shape than `x_t`'s.
        """

    @abstractmethod
    def predict_velocity_streaming(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        cache: KVCache,
        start_frame: int,
        store_kv: bool = False,
    ) -> Tensor:
        """The velocity of one chunk that sees the frames stored before it, fp32.

        With gradients on, they flow through the chunk's own pass only: the stored history is a constant.

        Args:
            x_t: one chunk, `[B, C, chunk_size, H, W]`.
            sigma: `[B]`.
            conditioning: of the batch.
            cache: from `new_cache`, holding all chunks before this one.
            start_frame: the latent frame in the clip that the chunk starts with.
            store_kv: also store this chunk. Run the finished chunk once more at sigma 0 with this on (Huang et al.
                2025, "Self-Forcing", alg. 1), and the next chunks see it clean.

        Raises:
            ValueError: for a chunk of another size, in another place, or that the cache can't serve.
        """

    @abstractmethod
    def streaming_decoder(self) -> Callable[[Tensor], Tensor]:
        """A decoder for one clip: called with its normalised chunks in order, it gives each one's video.

        The pieces `[B, 3, f, H, W]` in [0, 1], fp32, put together are what `decode_latents` makes of the whole clip.
        """

    def check_context_parallel(self, degree: int, latent_shape: Sequence[int]) -> None:
        """See `ModelBase.check_context_parallel`; masks and caches are of whole clips."""
        raise ValueError(f"{type(self).__name__} is causal, and masks and caches need all tokens of a clip")

    # What follows from it

    @property
    def streaming(self) -> dict[str, int | None]:
        """What generation has to know to run this network as it was trained."""
        return {
            "chunk_size": self.chunk_size,
            "local_window": self.local_window,
            "sink_frames": self.sink_frames,
        }

    def predict_x0(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        clean_history: Tensor | None = None,
        history_sigma: Tensor | None = None,
    ) -> Tensor:
        """The clean latents that the velocity at `x_t` points to, fp32; arguments as in `predict_velocity`."""
        velocity = self.predict_velocity(
            x_t, sigma, conditioning, clean_history=clean_history, history_sigma=history_sigma
        )
        return flow.velocity_to_x0(x_t, velocity, sigma)

    def predict_x0_streaming(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        cache: KVCache,
        start_frame: int,
        store_kv: bool = False,
    ) -> Tensor:
        """The clean chunk that the velocity at `x_t` points to, fp32; see `predict_velocity_streaming`."""
        velocity = self.predict_velocity_streaming(
            x_t, sigma, conditioning, cache=cache, start_frame=start_frame, store_kv=store_kv
        )
        return flow.velocity_to_x0(x_t, velocity, sigma)

    def check_latent_shape(self, shape: Sequence[int], *, num_frames: int | None = None) -> None:
        """See `ModelBase.check_latent_shape`; the frames must also divide into chunks."""
        # A family's class has its bidirectional sibling next in line, whose check this is.
        super().check_latent_shape(shape, num_frames=num_frames)  # type: ignore[safe-super]
        if shape[1] % self.chunk_size:
            raise ValueError(
                f"{shape[1]} latent frames do not divide into chunks of chunk_size={self.chunk_size}; crop the data or "
                "change models.<role>.chunk_size"
            )

    def check_history(
        self, x_t: Tensor, clean_history: Tensor | None, history_sigma: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """What the chunks of `x_t` see of a given history: its frames but the last chunk's, and their sigmas `[B, t]`.

        Args:
            x_t: `[B, C, T, H, W]`.
            clean_history: see `predict_velocity`; None gives None.
            history_sigma: see `predict_velocity`.

        Raises:
            ValueError: for a noise level without a history, or a history of another shape.
        """
        if clean_history is None:
            if history_sigma is not None:
                raise ValueError("history_sigma is the noise level of clean_history; give both or neither")
            return None
        if clean_history.shape != x_t.shape:
            raise ValueError(
                f"clean_history has shape {tuple(clean_history.shape)} but x_t {tuple(x_t.shape)}; give the whole "
                "clip, each chunk reads only what is before it"
            )
        if history_sigma is None:
            history_sigma = torch.zeros(x_t.shape[0], device=x_t.device)
        # No chunk sees the last one's clean copy.
        length = x_t.shape[2] - self.chunk_size
        return clean_history[:, :, :length], flow.per_frame(history_sigma, x_t)[:, :length]

    def new_cache(
        self, batch_size: int, latent_shape: Sequence[int], *, rolling: bool = False, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for clips of latents `[C, T, H, W]`, on the network's device.

        Args:
            batch_size: the number of clips.
            latent_shape: of each of them.
            rolling: keep only what the coming chunk can see, sinks and window, however long the clip; for generation
                without gradients.
            dtype: of what is stored; None is what the network computes in.

        Raises:
            ValueError: for a rolling cache without a window, or latents that don't fit the network.
        """
        return self.cache_class(
            **self.cache_sizes(batch_size, latent_shape, rolling=rolling),
            # No frame of so short a clip sees its last one, which need not be kept as a sink.
            sink_frames=min(self.sink_frames, latent_shape[1] - 1),
            local_window=self.local_window,
            device=self.device,
            dtype=dtype or self.compute_dtype,
        )

    def cache_sizes(self, batch_size: int, latent_shape: Sequence[int], *, rolling: bool = False) -> dict[str, Any]:
        """What `cache_class` and its `required_bytes` want to know of a clip; see `new_cache`."""
        self.check_latent_shape(latent_shape)
        _, _, height, width = latent_shape
        config = self.network_config
        return {
            "num_layers": config.num_layers,
            "batch_size": batch_size,
            "num_heads": config.num_attention_heads,
            "head_dim": config.attention_head_dim,
            "tokens_per_frame": (height // config.patch_size[1]) * (width // config.patch_size[2]),
            "capacity_frames": self.cache_frames(latent_shape[1], rolling=rolling),
        }

    def cache_frames(self, num_frames: int, *, rolling: bool) -> int:
        """How many latent frames a cache has to hold for a clip of so many; see `new_cache`.

        Raises:
            ValueError: for a rolling cache without a window.
        """
        if not rolling:
            return num_frames
        if self.local_window is None:
            raise ValueError(
                "a rolling cache keeps what a window shows, but local_window is null; set models.<role>.local_window"
            )
        return min(num_frames, self.sink_frames + self.local_window + self.chunk_size)

    def check_chunk(self, x_t: Tensor, start_frame: int) -> None:
        """Raise a `ValueError` unless `x_t` is one chunk and can start at `start_frame`."""
        if x_t.shape[2] != self.chunk_size:
            raise ValueError(
                f"x_t has {x_t.shape[2]} latent frames; streaming takes one chunk of chunk_size={self.chunk_size}"
            )
        if start_frame < 0 or start_frame % self.chunk_size:
            raise ValueError(
                f"start_frame={start_frame} is not the beginning of a chunk; give a multiple of "
                f"chunk_size={self.chunk_size}"
            )


def causal_adapters(model: ModelBase) -> str:
    """What a config may name as `_target_` for chunks in the place of `model`: its family's adapter, else all."""
    # The package lists its names without importing what is behind them.
    import fv_distill.models

    names = [name for name in fv_distill.models.__all__ if name.startswith("Causal") and name != "CausalModelBase"]
    own = f"Causal{type(model).__name__}"
    return " or ".join(f"fv_distill.models.{name}" for name in ([own] if own in names else names))
