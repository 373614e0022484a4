"""From a bidirectional teacher to a causal student that streams: teacher paths, causal KD, Self-Forcing.

    python examples/scenarios/causal_wan/run.py            # digits, on a CPU; the script behind `make demo-causal`
    python examples/scenarios/causal_wan/run.py --resume   # go on after an interruption

    python examples/scenarios/causal_wan/run.py --output-dir outputs/causal-wan \\
        --kd-config examples/configs/kd_causal/wan2.1_1.3b.yaml \\
        --self-forcing-config examples/configs/self_forcing/wan2.1_1.3b.yaml \\
        --accelerate-config configs/accelerate/fsdp2_8gpu.yaml --data-path /data/captions

Paths, runs and students lie in the output directory: paths/, kd/, kd-student/, self_forcing/, student/. The digits
students are then measured and drawn. Further options, such as --training.seed 1, go to both trainings.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
KD_CONFIG = HERE / "kd_causal.yaml"
SELF_FORCING_CONFIG = HERE / "self_forcing.yaml"
CPU_CONFIG = REPOSITORY / "configs/accelerate/cpu.yaml"
WRITTEN = ("paths", "kd", "kd-student", "self_forcing", "student")


@dataclass(frozen=True)
class Stage:
    """One launch: a script with its options, the directory of its run and what shows that it is done."""

    name: str
    command: tuple[str, ...]
    options: tuple[str, ...]
    run: Path | None = None
    done: Path | None = None


def main() -> None:
    args, overrides = parse_arguments()
    output = args.output_dir.resolve()
    started = time.monotonic()
    if not args.resume:
        clear(output, overwrite=args.overwrite)
    seconds = {}
    for stage in stages(args, output, overrides):
        begun = time.monotonic()
        launch(stage, args)
        seconds[stage.name] = round(time.monotonic() - begun, 1)
    if args.kd_config != KD_CONFIG or args.self_forcing_config != SELF_FORCING_CONFIG:
        print(f'stream it: fv-distill generate --model {output / "student"} --prompt "..." --stream')
        return

    # Judge, metrics and pictures are the main demo's.
    sys.path.append(str(REPOSITORY / "examples/digits"))
    from measure import measure_and_report

    measure_and_report(output, seed=args.seed, fast=args.fast, seconds=seconds, started=started)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The script's own options, and those that are passed on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kd-config", type=Path, default=KD_CONFIG, help="of the paths and of causal KD")
    parser.add_argument("--self-forcing-config", type=Path, default=SELF_FORCING_CONFIG)
    parser.add_argument("--accelerate-config", type=Path, default=CPU_CONFIG)
    parser.add_argument("--data-path", type=Path, help="rows of captions, in place of the configs'")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo-causal"))
    parser.add_argument("--seed", type=int, default=0, help="of both trainings")
    parser.add_argument("--resume", action="store_true", help="skip finished stages and continue the interrupted one")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in the directory")
    parser.add_argument("--fast", action="store_true", help="a few steps and clips, to see that all of it runs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the stages")
    args, overrides = parser.parse_known_args()
    if args.resume and args.overwrite:
        parser.error("--resume continues what is there, --overwrite removes it: give one of them")
    args.kd_config, args.self_forcing_config = args.kd_config.resolve(), args.self_forcing_config.resolve()
    return args, overrides


def clear(output: Path, *, overwrite: bool) -> None:
    """Make room for a run from the start; what an earlier one made may have taken days."""
    present = [name for name in WRITTEN if (output / name).exists()]
    if present and not overwrite:
        message = f"error: {output} holds an earlier run ({', '.join(present)}); continue it with --resume, replace it "
        print(f"{message}with --overwrite, or choose another --output-dir", file=sys.stderr)
        raise SystemExit(2)
    for name in present:
        shutil.rmtree(output / name)


def stages(args: argparse.Namespace, output: Path, overrides: list[str]) -> list[Stage]:
    """The three stages, each fed with what the one before it left."""
    paths, kd_student, student = output / "paths", output / "kd-student", output / "student"
    common = ["--training.seed", str(args.seed), *overrides]
    if args.data_path:
        common += ["--training.data.data_path", str(args.data_path.resolve())]
    kd = ["--config", str(args.kd_config), "--method.teacher_path_cache", str(paths), *common]
    self_forcing = ["--config", str(args.self_forcing_config), *common]
    # A directory, because a large network's weights lie in several files.
    self_forcing += ["--models.student.weights", str(kd_student / "transformer")]
    if args.fast:
        kd += ["--method.trajectories_per_row", "2", "--method.teacher_inference_steps", "12"]
        kd += ["--training.loop.max_train_steps", "4", "--training.data.train_batch_size", "8"]
        self_forcing += ["--training.loop.max_train_steps", "4", "--training.data.train_batch_size", "8"]
    return [
        Stage("teacher paths", ("-m", "fv_distill", "make-trajectories"), tuple(kd)),
        training_stage("causal KD", "train_kd.py", kd, output / "kd", kd_student),
        training_stage("Self-Forcing", "train_self_forcing.py", self_forcing, output / "self_forcing", student),
    ]


def training_stage(name: str, script: str, options: list[str], run: Path, student: Path) -> Stage:
    """A training whose last act is the student's export."""
    written = ["--output-dir", str(run), "--pipeline.export_dir", str(student)]
    return Stage(name, (str(REPOSITORY / "examples" / script),), (*options, *written), run, student / "fv_distill.json")


def launch(stage: Stage, args: argparse.Namespace) -> None:
    """Run a stage as a user would, or what is left of it."""
    options = list(stage.options)
    if stage.run is not None and stage.done is not None:
        if args.resume and stage.done.is_file():
            print(f"{stage.name}: done before, in {stage.done.parent}", flush=True)
            return
        stage.done.unlink(missing_ok=True)
        interrupted = args.resume and any((stage.run / "checkpoints").glob("step-????????/metadata.json"))
        options += ["--resume-from-checkpoint", "latest"] if interrupted else ["--overwrite"]
    if args.debug:
        options += ["--debug"]
    threads = []
    if args.accelerate_config == CPU_CONFIG and "OMP_NUM_THREADS" not in os.environ:
        threads = ["--num_cpu_threads_per_process", str(os.cpu_count())]
    command = ["--config_file", str(args.accelerate_config.resolve()), *threads, *stage.command, *options]
    print(f"$ accelerate launch {' '.join(command)}", flush=True)
    # The configs name their files from the repository's root.
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    status = subprocess.run([*launcher, *command], cwd=REPOSITORY, check=False).returncode
    # A stage that is stopped by a signal saves, ends well, and has no student to show.
    if status == 0 and stage.done is not None and not stage.done.is_file():
        status = 1
    if status:
        print(f"{stage.name} ended with status {status}; --resume goes on from there", file=sys.stderr)
        raise SystemExit(status if status > 0 else 128 - status)


if __name__ == "__main__":
    main()
