"""The memory of DMD2 on one shared network, against LoRA fine-tuning of one model and against three networks.

DMD2 has three roles of one shape. With `share_base_with` student and critic are adapters on the teacher's frozen
weights, of which there is one copy; without it each role has its own. The network is shaped like Wan 2.1 1.3B, with
random bfloat16 weights and a clip of a few tokens, so that it fits a machine without a GPU; there weights decide, as
they do on a GPU with gradient checkpointing, which is on.

Each side runs in a process of its own, which makes its networks, trains for some steps (fine-tuning: its one loss;
DMD2: an update of the student and one of the critic), and reports by how much its resident memory grew at most. The
reported ratio is shared base / fine-tuning, and the target is at most 1.25. The script prints one JSON line.

    OMP_NUM_THREADS=2 python benchmarks/shared_base.py
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from fv_distill.methods import DMD2Method, DMD2Options, FineTuneMethod, TrainingMethod
from fv_distill.methods.options import CfgUncondOptions
from fv_distill.models import WanModel
from fv_distill.rng import SampleRng

TEACHER = Path(__file__).resolve().parents[1] / "examples/digits/teacher"
"""Gives the VAE's statistics; the networks are random."""

SIDES = ("finetune", "shared", "three")
TEXT_DIM, TEXT_LENGTH = 4096, 32


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=12, help="of 128 dimensions")
    parser.add_argument("--ffn-dim", type=int, default=8960)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--latent-frames", type=int, default=2)
    parser.add_argument("--latent-size", type=int, default=8, help="height and width; a token is 2 x 2")
    parser.add_argument("--steps", type=int, default=2, help="the first warms up, and makes the optimizers' states")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_network(args: argparse.Namespace) -> WanTransformer3DModel:
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=args.heads,
            attention_head_dim=128,
            num_layers=args.layers,
            ffn_dim=args.ffn_dim,
            text_dim=TEXT_DIM,
            cross_attn_norm=True,
        )
    rope = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, num_layers=1, ffn_dim=8, text_dim=8
    ).rope
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    # The rotary tables are no weights.
    network.rope = rope
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return network


def make_role(network: WanTransformer3DModel) -> WanModel:
    return WanModel(network, directory=TEACHER, flow_shift=3.0, text_length=TEXT_LENGTH)


def make_method(args: argparse.Namespace) -> TrainingMethod:
    teacher = make_role(make_network(args))
    if args.side == "finetune":
        models = {"student": teacher}
    elif args.side == "shared":
        roles = {role: WanModel.on_base(teacher, text_length=TEXT_LENGTH) for role in ("student", "critic")}
        models = {**roles, "teacher": teacher}
    else:
        models = {"teacher": teacher, **{role: make_role(make_network(args)) for role in ("student", "critic")}}
    for role in ("student", "critic"):
        if role in models:
            models[role].add_lora(role, rank=args.rank, target_modules="all")
            models[role].enable_gradient_checkpointing()
    if args.side == "finetune":
        return FineTuneMethod(models)
    options = DMD2Options(
        real_score_guidance_scale=3.0, cfg_uncond=CfgUncondOptions(text="zero"), generator_update_interval=1
    )
    return DMD2Method(models, options)


def run_side(args: argparse.Namespace) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    method = make_method(args)
    trained = {
        role: [p for n, p in model.transformer.named_parameters() if model.is_trained(n)]
        for role, model in method.models.items()
        if model.trainable
    }
    optimizers = {role: torch.optim.AdamW(parameters, lr=1e-5) for role, parameters in trained.items()}
    shape = (16, args.latent_frames, args.latent_size, args.latent_size)
    batch: dict[str, Any] = {
        "vae_latent": torch.randn(1, *shape),
        "text_embedding": torch.randn(1, TEXT_LENGTH, TEXT_DIM),
        "text_mask": torch.ones(1, TEXT_LENGTH, dtype=torch.bool),
        "caption_dropped": torch.zeros(1, dtype=torch.bool),
    }
    seconds = []
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        for role in method.updates(step):
            for term in method.losses(role, batch, SampleRng(0, step, [0])):
                term.loss.backward()
            optimizers[role].step()
            optimizers[role].zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In kB on Linux; what Python and the libraries take is no part of a side.
    return {"gb": (peak - before) / 1e6, "seconds": statistics.median(seconds[1:] or seconds)}


def main() -> None:
    args = parse_args()
    if args.side is not None:
        print(json.dumps(run_side(args)))
        return
    found = {}
    for side in SIDES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--side", side], capture_output=True, text=True, check=True
        )
        found[side] = json.loads(done.stdout.splitlines()[-1])
    result = {
        "benchmark": "shared_base",
        "ratio": round(found["shared"]["gb"] / found["finetune"]["gb"], 3),
        "target_ratio": 1.25,
        "ratio_to_three_networks": round(found["shared"]["gb"] / found["three"]["gb"], 3),
        "seconds_over_three_networks": round(found["shared"]["seconds"] / found["three"]["seconds"], 3),
        "peak_gb": {side: round(found[side]["gb"], 2) for side in SIDES},
        "step_seconds": {side: round(found[side]["seconds"], 2) for side in SIDES},
        "parameters": sum(parameter.numel() for parameter in make_network(args).parameters()),
        "rank": args.rank,
        "tokens": args.latent_frames * (args.latent_size // 2) ** 2,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
