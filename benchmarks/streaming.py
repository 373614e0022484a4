"""What streaming with a causal student costs: time per chunk, network calls, memory of the noise level's embedding.

- `ratio`: seconds of the last chunks over seconds of the first ones that see a full window; with a window the time of a
  chunk must not depend on where it is, so 1 is flat.
- `calls`: network calls of a Self-Forcing cycle (k critic updates, one of them with the student's), counted by hooks,
  and the arithmetic minimum.
- `modulation_mb`: bytes of the modulation that Wan 1.3B makes of its noise levels for 81 frames at 480 x 832, one level
  per latent frame, against one per token as the stock network would have it; measured on meta tensors.

Prints one JSON line.

    python benchmarks/streaming.py
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from fv_distill.generation import stream_clip
from fv_distill.methods import SelfForcingMethod, SelfForcingOptions
from fv_distill.models import CausalWanModel, Conditioning, WanModel
from fv_distill.models.transformers.wan_causal import CausalWanTransformer3DModel
from fv_distill.rng import SampleRng

CHANNELS, TEXT_TOKENS, TEXT_WIDTH = 16, 16, 64
SIGMAS = (1.0, 0.9, 0.75, 0.5)
WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
LATENT_FRAMES, TOKENS_PER_FRAME = 21, 30 * 52


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--chunk-size", type=int, default=3)
    parser.add_argument("--local-window", type=int, default=6)
    parser.add_argument("--latent-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--interval", type=int, default=5, help="critic updates of a cycle")
    return parser.parse_args()


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """A network that is large enough for its time to be its own."""
    return {
        "num_attention_heads": args.width // 32,
        "attention_head_dim": 32,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 64,
        "ffn_dim": 4 * args.width,
        "num_layers": args.layers,
    }


def make_directory(folder: Path) -> Path:
    """As much of a pipeline directory as an adapter reads."""
    (folder / "vae").mkdir()
    statistics_ = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    (folder / "vae" / "config.json").write_text(
        json.dumps({"scale_factor_temporal": 4, "scale_factor_spatial": 8, **statistics_})
    )
    return folder


def make_student(directory: Path, args: argparse.Namespace, *, trainable: bool) -> CausalWanModel:
    network = CausalWanTransformer3DModel(**sizes(args))
    return CausalWanModel(
        network,
        directory=directory,
        flow_shift=3.0,
        trainable=trainable,
        chunk_size=args.chunk_size,
        local_window=args.local_window,
    )


def seconds_per_chunk(student: CausalWanModel, args: argparse.Namespace) -> list[float]:
    shape = (CHANNELS, args.chunks * args.chunk_size, args.latent_size, args.latent_size)
    chunks = stream_clip(
        student,
        Conditioning(torch.randn(1, TEXT_TOKENS, TEXT_WIDTH), None),
        shape,
        sigmas=SIGMAS,
        sample_type="sde",
        context_noise=0.0,
        key=(0, "benchmark"),
    )
    seconds = []
    for _ in range(args.chunks):
        start = time.perf_counter()
        next(chunks)
        seconds.append(time.perf_counter() - start)
    return seconds


def count_calls(directory: Path, args: argparse.Namespace) -> dict[str, int]:
    """One cycle at the mean depth: every exit step once, so that the counts are whole numbers per step list."""
    models: dict[str, Any] = {
        "student": make_student(directory, args, trainable=True),
        "teacher": WanModel(WanTransformer3DModel(**sizes(args)), directory=directory, flow_shift=3.0),
        "critic": WanModel(WanTransformer3DModel(**sizes(args)), directory=directory, flow_shift=3.0, trainable=True),
    }
    options = SelfForcingOptions(generator_update_interval=args.interval, real_score_guidance_scale=1.0)
    method = SelfForcingMethod(models, options)
    calls = dict.fromkeys(models, 0)
    for name, model in models.items():
        model.transformer.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    num_chunks = 3
    batch = {
        "text_embedding": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH),
        "text_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.bool),
        "latent_shape": (CHANNELS, num_chunks * args.chunk_size, 4, 4),
    }
    minimum = 0
    for step in range(1, args.interval + 1):
        rng = SampleRng(0, step, [0])
        roles = method.updates(step)
        # One rollout a step: the student's where it is updated, with a replay of each chunk, else the critic's.
        depth = rng.shared_integer(f"{roles[0]}/exit", len(method.few_step_sigmas)) + 1
        minimum += num_chunks * depth + num_chunks - 1 + 1
        if "student" in roles:
            minimum += num_chunks + 2
        for role in roles:
            for term in method.losses(role, batch, rng):
                term.loss.backward()
    return {**calls, "total": sum(calls.values()), "minimum": minimum}


def modulation_bytes() -> dict[str, float]:
    """Of one forward pass's shared modulation, `[B, levels, 6, width]`, as it leaves the embedder."""
    with torch.device("meta"):
        network = CausalWanTransformer3DModel(in_channels=16, out_channels=16, text_dim=4096, freq_dim=256, **WAN_1_3B)
        text = torch.empty(1, 512, 4096)
        sizes_mb = {}
        for name, levels in (("per_frame", LATENT_FRAMES), ("per_token", LATENT_FRAMES * TOKENS_PER_FRAME)):
            _, modulation, _, _ = network.condition_embedder(torch.empty(levels), text, timestep_seq_len=levels)
            sizes_mb[name] = modulation.numel() * modulation.element_size() / 1e6
    return sizes_mb


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        directory = make_directory(Path(temporary))
        seconds = seconds_per_chunk(make_student(directory, args, trainable=False), args)
        calls = count_calls(directory, args)
    modulation = modulation_bytes()
    full = 1 + -(-args.local_window // args.chunk_size)
    quarter = max(1, (len(seconds) - full - 1) // 4)
    # The last chunk stores nothing and is left out.
    first, last = seconds[full : full + quarter], seconds[-1 - quarter : -1]
    result = {
        "benchmark": "streaming",
        "ratio": round(statistics.median(last) / statistics.median(first), 3),
        "target_ratio": 1.1,
        "ms_per_chunk": round(1000 * statistics.median(seconds[full:-1]), 2),
        "ms_first_chunk": round(1000 * seconds[0], 2),
        "chunks": args.chunks,
        "local_window": args.local_window,
        "calls": calls,
        "calls_ratio": calls["total"] / calls["minimum"],
        "modulation_mb": {name: round(size, 2) for name, size in modulation.items()},
        "modulation_ratio": round(modulation["per_token"] / modulation["per_frame"], 1),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
