"""What a Self-Forcing step of the student keeps for its backward pass: gradient replay against the plain graph.

Counts the bytes of tensors that autograd saves and that no parameter owns, at their peak, for clips of more and more
chunks. With replay one chunk's are alive at a time: with a local window the peak must not grow with the clip. Without
one (`--local-window -1`) it grows by the history's keys and values, of which attention keeps a copy. Prints one JSON
line; `ratio` is replay's peak at the most chunks over its peak at the fewest, 1 being flat.

    python benchmarks/self_forcing_memory.py
"""

import argparse
import json
import weakref
from collections.abc import Iterator

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from fv_distill.losses import direction_loss
from fv_distill.models import CausalModelBase, Conditioning, KVCache
from fv_distill.models.transformers.block_causal import ChunkLayout
from fv_distill.models.transformers.wan_causal import CausalWanTransformer3DModel
from fv_distill.rollouts import autoregressive_rollout

TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 16, 64, 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--chunk-size", type=int, default=3)
    parser.add_argument("--local-window", type=int, default=3, help="latent frames of history; -1 for all")
    parser.add_argument("--latent-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of each chunk")
    return parser.parse_args()


class Student:
    """As much of a causal adapter as a rollout calls, around a network without a pipeline directory."""

    def __init__(self, network: nn.Module, chunk_size: int, local_window: int | None) -> None:
        self.transformer = network
        self.chunk_size = chunk_size
        self.local_window = local_window

    def new_cache(self, batch_size: int, shape: tuple[int, ...]) -> KVCache:
        config = self.transformer.config
        return KVCache(
            num_layers=config.num_layers,
            batch_size=batch_size,
            num_heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            tokens_per_frame=(shape[2] // 2) * (shape[3] // 2),
            capacity_frames=shape[1],
            local_window=self.local_window,
        )

    def predict_velocity_streaming(self, x_t, sigma, conditioning, *, cache, start_frame, store_kv=False):
        cache.use_text(conditioning.text)
        return self.transformer(
            x_t,
            1000 * sigma,
            conditioning.text,
            return_dict=False,
            cache=cache,
            start_frame=start_frame,
            store_kv=store_kv,
        )[0]

    predict_x0_streaming = CausalModelBase.predict_x0_streaming


class SavedBytes:
    """Counts what autograd keeps: a storage from when it is first saved until nobody holds it."""

    def __init__(self, network: nn.Module) -> None:
        self.current = self.peak = 0
        self._owned = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        self._alive: dict[int, int] = {}

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed[0])
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, object]:
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if key in self._owned:
            return tensor, None
        token = Token()
        self._alive[key] = self._alive.get(key, 0) + 1
        if self._alive[key] == 1:
            self.current += size
            self.peak = max(self.peak, self.current)
        weakref.finalize(token, self._release, key, size)
        return tensor, token

    def _release(self, key: int, size: int) -> None:
        self._alive[key] -= 1
        if self._alive[key] == 0:
            self.current -= size


class Token:
    """Lives as long as one saved tensor."""


def losses(
    student: Student, clip: torch.Tensor, text: Conditioning, *, steps: int, replay: bool
) -> Iterator[torch.Tensor]:
    """A student update's terms as `SelfForcingMethod` yields them, with a made-up direction."""
    rollout = autoregressive_rollout(
        student,
        clip,
        text,
        [1 - step / steps for step in range(steps)],
        exit_steps=[steps - 1] * (clip.shape[2] // student.chunk_size),
        sample_type="sde",
        fresh_noise=lambda chunk, step: torch.randn_like(clip[:, :, : student.chunk_size]),
        grad=not replay,
    )
    direction = torch.ones_like(clip)
    if not replay:
        yield direction_loss(rollout.x0, direction)
        return
    for call in rollout.calls:
        yield direction_loss(call.predict_x0(student, text, rollout.cache), direction[:, :, : student.chunk_size])


def peak_bytes(student: Student, num_chunks: int, args: argparse.Namespace, *, replay: bool) -> int:
    generator = torch.Generator().manual_seed(0)
    shape = (1, CHANNELS, num_chunks * args.chunk_size, args.latent_size, args.latent_size)
    clip = torch.randn(shape, generator=generator)
    text = Conditioning(torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator), None)
    with SavedBytes(student.transformer) as saved, torch.set_grad_enabled(True):
        terms = losses(student, clip, text, steps=args.steps, replay=replay)
        while (loss := next(terms, None)) is not None:
            loss.backward()
            del loss
    student.transformer.zero_grad()
    return saved.peak


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    network = CausalWanTransformer3DModel.from_config(
        WanTransformer3DModel(
            num_attention_heads=args.width // 32,
            attention_head_dim=32,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=4 * args.width,
            num_layers=args.layers,
        ).config
    )
    window = None if args.local_window < 0 else args.local_window
    network.layout = ChunkLayout(args.chunk_size, window)
    student = Student(network, args.chunk_size, window)
    replay = [peak_bytes(student, count, args, replay=True) for count in args.chunks]
    plain = [peak_bytes(student, count, args, replay=False) for count in args.chunks]
    result = {
        "benchmark": "self_forcing_memory",
        "ratio": round(replay[-1] / replay[0], 3),
        "target_ratio": 1.05,
        "chunks": args.chunks,
        "local_window": window,
        "replay_mb": [round(size / 1e6, 2) for size in replay],
        "plain_mb": [round(size / 1e6, 2) for size in plain],
        "plain_over_replay": [round(a / b, 2) for a, b in zip(plain, replay, strict=True)],
        "tokens_per_chunk": args.chunk_size * (args.latent_size // 2) ** 2,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
