"""Run the main job on the digits and measure what came out: the script behind `make demo`.

    python examples/digits/demo.py --seed 0
    python examples/digits/demo.py --lora      # and a student that is a LoRA on the teacher's own network

It trains the student with examples/train_dmd2.py, loads the export with stock diffusers, samples clips from it and from
the teacher in several ways with the same prompts and the same noise, and writes results.json, results.md, samples.png,
samples.gif and curves.png.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from metrics import Evaluator
from report import print_table, write_curves, write_samples, write_table
from sampling import NOISE_SEED, Row, draw_noise, generate, make_row
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fv_distill.data.digits import CAPTIONS, sample_clips
from fv_distill.export import few_step_scheduler
from fv_distill.schedules import few_step_sigmas

REPOSITORY = Path(__file__).resolve().parents[2]
TEACHER = REPOSITORY / "examples/digits/teacher"
CONFIG = REPOSITORY / "examples/configs/dmd2/digits.yaml"
LORA_CONFIG = REPOSITORY / "examples/configs/dmd2/digits_lora_shared.yaml"
STUDENT, LORA_STUDENT = "student", "student, LoRA"
TEACHER_STEPS = 50
TEACHER_GUIDANCE = 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the training run")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--fast", action="store_true", help="a few steps and clips, to see that all of it runs")
    parser.add_argument(
        "--lora", action="store_true", help="train a LoRA student beside the whole one and compare them"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the training run")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    output = args.output_dir.resolve()
    student, lora = output / "student", output / "student-lora" if args.lora else None
    distil(CONFIG, output / "run", student, seed=args.seed, fast=args.fast, debug=args.debug)
    if lora is not None:
        distil(LORA_CONFIG, output / "run-lora", lora, seed=args.seed, fast=args.fast, debug=args.debug)
    distilled = time.monotonic()

    count, teacher_steps = (80, 4) if args.fast else (1000, TEACHER_STEPS)
    rows, clips = measure(student, lora, count=count, teacher_steps=teacher_steps)
    seconds = {"distillation": round(distilled - started, 1), "whole": round(time.monotonic() - started, 1)}
    results = {
        "seed": args.seed,
        "clips": count,
        "fast": args.fast,
        "seconds": seconds,
        "rows": [asdict(r) for r in rows],
    }
    results["bar"] = check_bar(rows)
    write_samples(clips, output)
    write_curves(output / "run" / "metrics.jsonl", output / "curves.png")
    write_table("Digits demo", results, output / "results.md")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table("Digits demo", results)
    print(f"wrote {', '.join(sorted(path.name for path in output.iterdir() if path.is_file()))} to {args.output_dir}")


def distil(config: Path, run: Path, student: Path, *, seed: int, fast: bool, debug: bool) -> None:
    """The main job, as a user would launch it."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(REPOSITORY / "configs/accelerate/cpu.yaml")]
    command += ["--num_cpu_threads_per_process", str(os.cpu_count())]
    command += [str(REPOSITORY / "examples/train_dmd2.py"), "--config", str(config), "--overwrite"]
    command += ["--output-dir", str(run), "--training.seed", str(seed)]
    command += ["--pipeline.export_dir", str(student)]
    if fast:
        command += ["--training.loop.max_train_steps", "4", "--method.generator_update_interval", "2"]
        command += ["--training.data.train_batch_size", "8"]
    if debug:
        command += ["--debug"]
    print(f"$ accelerate launch examples/train_dmd2.py {' '.join(command[8:])}", flush=True)
    # The config names its files from the repository's root.
    status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    if status:
        raise SystemExit(status)


def measure(student: Path, lora: Path | None, *, count: int, teacher_steps: int) -> tuple[list[Row], dict[str, Tensor]]:
    """The rows of the results, and the clips that the pictures show."""
    few = len(json.loads((student / "fv_distill.json").read_text())["sigmas"])
    teacher = DiffusionPipeline.from_pretrained(TEACHER)
    distilled = DiffusionPipeline.from_pretrained(student)
    # The student's own pipeline around the teacher's weights: what the student was before it was trained.
    undistilled = DiffusionPipeline.from_pretrained(student)
    undistilled.register_modules(transformer=teacher.transformer)
    half = max(1, few // 2)
    ways = [
        (f"teacher, {teacher_steps} steps", teacher, teacher_steps, TEACHER_GUIDANCE),
        (f"teacher, {few} steps (twice the passes)", with_even_steps(teacher, few), few, TEACHER_GUIDANCE),
        (f"teacher, {half} steps (the student's passes)", with_even_steps(teacher, half), half, TEACHER_GUIDANCE),
        ("undistilled network", undistilled, few, 1.0),
        (STUDENT, distilled, few, 1.0),
    ]
    if lora is not None:
        ways.append((LORA_STUDENT, load_lora(lora), few, 1.0))
    evaluate = Evaluator()
    captions = torch.arange(count) % len(CAPTIONS)
    noise = draw_noise(count)
    held_out = sample_clips("held_out", count, torch.Generator().manual_seed(NOISE_SEED))
    rows = [make_row("real, held out", None, None, 0, evaluate(held_out.clips, held_out.captions), 0.0)]
    clips = {}
    for name, pipeline, steps, guidance in ways:
        start = time.monotonic()
        clips[name] = generate(pipeline, captions, noise, steps=steps, guidance=guidance)
        seconds = time.monotonic() - start
        passes = steps * (1 if guidance == 1 else 2)
        rows.append(make_row(name, steps, guidance, passes, evaluate(clips[name], captions), seconds))
    pictured = [ways[0][0], ways[2][0], STUDENT, *([LORA_STUDENT] if lora is not None else [])]
    return rows, {name: clips[name] for name in pictured}


def load_lora(directory: Path) -> Any:
    """The teacher's pipeline with an adapter and its scheduler, by stock diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(TEACHER)
    pipeline.load_lora_weights(directory)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory, subfolder="scheduler")
    return pipeline


def with_even_steps(pipeline: Any, steps: int) -> Any:
    """The pipeline with evenly spaced steps, shifted once: its own scheduler shifts twice, which ruins a few steps."""
    timesteps = [1000 * (1 - index / steps) for index in range(steps)]
    sigmas = few_step_sigmas(timesteps, flow_shift=pipeline.scheduler.config.shift, warp=True)
    return type(pipeline)(**{**pipeline.components, "scheduler": few_step_scheduler(sigmas, sample_type="ode")})


def check_bar(rows: list[Row]) -> dict[str, Any]:
    """The student against the two ways that cost as much, and against the teacher that costs much more."""
    teacher, _, equal_passes, undistilled, student, *lora = rows[1:]
    rivals = (equal_passes, undistilled)
    cnn = max(student.frechet_cnn / rival.frechet_cnn for rival in rivals)
    pixel = max(student.frechet_pixel / rival.frechet_pixel for rival in rivals)
    lost = teacher.prompt_accuracy - student.prompt_accuracy
    is_met = cnn <= 0.5 and pixel <= 0.7 and lost <= 0.01
    compared = {}
    for row in lora:
        ratios = row.frechet_cnn / student.frechet_cnn, row.frechet_pixel / student.frechet_pixel
        compared["LoRA's frechet_cnn over the whole student's, at most 1.2"] = round(ratios[0], 3)
        compared["LoRA's frechet_pixel over the whole student's, at most 1.2"] = round(ratios[1], 3)
        is_met = is_met and max(ratios) <= 1.2
    return {
        "frechet_cnn over equal passes, at most 0.5": round(cnn, 3),
        "frechet_pixel over equal passes, at most 0.7": round(pixel, 3),
        "prompt accuracy lost, at most 0.01": round(lost, 4),
        "at most the many-step teacher's distances": student.frechet_cnn <= teacher.frechet_cnn
        and student.frechet_pixel <= teacher.frechet_pixel,
        **compared,
        "met": is_met,
    }


if __name__ == "__main__":
    main()
