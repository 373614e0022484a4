"""How often a DMD2 cycle, 5 critic updates and 1 student update, calls each network, against the arithmetic minimum.

Forward hooks count the calls of the real `DMD2Method` on tiny networks over many drawn exit steps. With n denoising
steps, an update interval of k and a rollout that stops at the drawn exit step e (e + 1 student calls, (n + 1) / 2 on
average over uniform e), the minimum for one cycle of k steps, each with a batch of its own, is

    student   one rollout for each of the k batches                        sum of e + 1     k (n + 1) / 2 expected
    critic    one call with a graph in each of its k updates, and one without in the student's      k + 1
    teacher   one conditional and, with guidance, one unconditional call in the student's update        2

With n = 4 and k = 5 that is 12.5 + 6 + 2 = 20.5 calls expected. It needs `reuse_rollout`, which gives the student's
rollout to the critic's update of the same step; a fresh rollout there costs (n + 1) / 2 more, 23 in all. Rollouts that
always run to the end would take n calls each: 28 and 32. Both settings are measured, each against its own minimum for
the exit steps that were really drawn, so equality is exact and not statistical. The script prints one JSON line.

    python benchmarks/forward_passes.py
"""

import argparse
import copy
import json
from collections import Counter
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from fv_distill.methods import DMD2Method, DMD2Options
from fv_distill.models import WanModel
from fv_distill.rng import SampleRng

TEACHER = Path(__file__).resolve().parents[1] / "examples/digits/teacher"
"""Gives the text encoder and the VAE's statistics; the networks are random."""

LATENT_SHAPE = (16, 1, 4, 4)
TEXT_LENGTH = 8
SEED = 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cycles", type=int, default=200, help="how many times k critic updates and one of the student"
    )
    parser.add_argument("--denoising-steps", type=int, default=4, metavar="N")
    parser.add_argument("--update-interval", type=int, default=5, metavar="K")
    parser.add_argument("--guidance-scale", type=float, default=3.5, help="of the teacher; 1 skips its second call")
    return parser.parse_args()


def make_models() -> dict[str, WanModel]:
    torch.manual_seed(SEED)
    network = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        num_layers=1,
        ffn_dim=12,
        freq_dim=12,
        text_dim=32,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        rope_max_seq_len=32,
    )
    trainable = {"student": True, "teacher": False, "critic": True}
    return {
        role: WanModel(
            copy.deepcopy(network), directory=TEACHER, flow_shift=3.0, trainable=trained, text_length=TEXT_LENGTH
        )
        for role, trained in trainable.items()
    }


def count_calls(models: dict[str, WanModel], options: DMD2Options, *, cycles: int) -> tuple[Counter[str], int]:
    """Calls by role over all cycles, and the sum of `e + 1` over the exit steps of the rollouts that are needed."""
    method = DMD2Method(models, options)
    method.encode_prompts()
    calls: Counter[str] = Counter()

    def counter(role: str):
        return lambda *_: calls.update([role])

    handles = [model.transformer.register_forward_hook(counter(role)) for role, model in models.items()]
    batch = {
        "text_embedding": torch.randn(1, TEXT_LENGTH, 32),
        "text_mask": torch.ones(1, TEXT_LENGTH, dtype=torch.bool),
        "latent_shape": LATENT_SHAPE,
    }
    num_steps = len(options.dmd_denoising_steps)
    needed = 0
    for step in range(1, cycles * options.generator_update_interval + 1):
        rng = SampleRng(SEED, step, [0])
        roles = method.updates(step)
        for role in roles:
            for _ in method.losses(role, batch, rng):
                pass
            if role == "student" or not (options.reuse_rollout and "student" in roles):
                needed += rng.shared_integer(f"{role}/exit", num_steps) + 1
    for handle in handles:
        handle.remove()
    return calls, needed


def measure(models: dict[str, WanModel], options: DMD2Options, *, cycles: int) -> dict[str, float]:
    calls, student_minimum = count_calls(models, options, cycles=cycles)
    interval, depth = options.generator_update_interval, (len(options.dmd_denoising_steps) + 1) / 2
    teacher_calls = 1 if options.real_score_guidance_scale == 1 else 2
    others = interval + 1 + teacher_calls
    minimum = student_minimum / cycles + others
    total = sum(calls.values()) / cycles
    return {
        **{role: round(count / cycles, 3) for role, count in sorted(calls.items())},
        "total": round(total, 3),
        "minimum": round(minimum, 3),
        "expected": (interval if options.reuse_rollout else interval + 1) * depth + others,
        "ratio": round(total / minimum, 6),
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    models = make_models()
    steps = tuple(1000 * (1 - i / args.denoising_steps) for i in range(args.denoising_steps))
    measured = {
        name: measure(
            models,
            DMD2Options(
                dmd_denoising_steps=steps,
                generator_update_interval=args.update_interval,
                real_score_guidance_scale=args.guidance_scale,
                reuse_rollout=reuse,
            ),
            cycles=args.cycles,
        )
        for name, reuse in (("reuse_rollout", True), ("fresh_rollout", False))
    }
    # The default setting is the one that is held to the minimum of the docstring.
    result = {
        "benchmark": "forward_passes",
        "ratio": measured["reuse_rollout"]["ratio"],
        "target_ratio": 1.0,
        "calls_per_cycle": measured["reuse_rollout"]["total"],
        **measured,
        "cycles": args.cycles,
        "denoising_steps": args.denoising_steps,
        "update_interval": args.update_interval,
        "guidance_scale": args.guidance_scale,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
