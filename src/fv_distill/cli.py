"""`fv-distill`: train, export and the demo from the command line. What a command needs is imported when it runs."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fv_distill

from .console import console, exit_on_user_error

_DEMO_SCRIPT = Path("examples/digits/demo.py")


def main(argv: Sequence[str] | None = None) -> None:
    """The `fv-distill` command; ends with status 2 and one message for what a user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        command, _ = COMMANDS[words[0]]
        command(words[1:])
        return
    parser = argparse.ArgumentParser(
        prog="fv-distill",
        description=fv_distill.__doc__,
        epilog="fv-distill COMMAND --help lists the options of a command",
    )
    parser.add_argument("--version", action="version", version=f"fv_distill {fv_distill.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    parser.parse_args(words)


def train(words: Sequence[str]) -> None:
    """Train what a YAML file describes, for any method; also `accelerate launch -m fv_distill train ...`."""
    from .config.command_line import parse_run_config

    config, command_line = parse_run_config(train.__doc__, argv=words, prog="fv-distill train")
    with exit_on_user_error(debug=command_line.debug):
        from .training.run import run_training

        run_training(config, dry_run=command_line.dry_run)


def make_trajectories(words: Sequence[str]) -> None:
    """Make the teacher paths that a KD config trains on; `accelerate launch -m fv_distill` shares them out."""
    from .config.command_line import parse_run_config

    config, command_line = parse_run_config(
        make_trajectories.__doc__,
        method_target=("fv_distill.methods.KDMethod", "fv_distill.methods.KDCausalMethod"),
        argv=words,
        prog="fv-distill make-trajectories",
    )
    with exit_on_user_error(debug=command_line.debug):
        from .training.run import run_make_trajectories

        run_make_trajectories(config, dry_run=command_line.dry_run)


def export(words: Sequence[str]) -> None:
    """Make a diffusers directory of a training checkpoint, on one process, whatever the run's world size was."""
    parser = argparse.ArgumentParser(prog="fv-distill export", description=export.__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", type=Path, help="a checkpoint directory of a run")
    parser.add_argument(
        "--output-dir", required=True, metavar="DIR", type=Path, help="the directory, or .safetensors file, to write"
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="the run's YAML, instead of the checkpoint's own")
    parser.add_argument("--role", default="student", help="the role to export (default: student)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="averaged weights, where there are any (default)",
    )
    parser.add_argument(
        "--format",
        choices=["diffusers", "lora", "comfyui", "merged", "original"],
        help="a complete diffusers directory; an adapter for load_lora_weights; the same as one file for ComfyUI; an "
        "adapter merged into a complete directory; the complete network as one file in its family's published names "
        "(default: lora for a student trained as one, unless it streams, else diffusers)",
    )
    parser.add_argument("--merge", dest="format", action="store_const", const="merged", help="--format merged")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the weights' own)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    with exit_on_user_error(debug=args.debug):
        from .export.convert import convert

        convert(
            args.checkpoint,
            args.output_dir,
            config=args.config,
            role=args.role,
            ema=args.ema,
            dtype=args.dtype,
            overwrite=args.overwrite,
            export_format=args.format,
        )
    console.print(f"exported {args.role} to {args.output_dir}", highlight=False, markup=False)


def push(words: Sequence[str]) -> None:
    """Upload an export to the Hugging Face Hub, or any diffusers or LoRA directory; again to resume or update.

    The login is that of `hf auth login`, or the environment's HF_TOKEN.
    """
    parser = argparse.ArgumentParser(prog="fv-distill push", description=push.__doc__, allow_abbrev=False)
    parser.add_argument("directory", metavar="DIR", type=Path, help="what to upload")
    parser.add_argument("repo_id", metavar="REPO", help="owner/name; made if it isn't there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--evaluation", metavar="FILE", type=Path, help="a JSON file with the rows of the card's quality table"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    with exit_on_user_error(debug=args.debug):
        from .export.hub import push_directory

        url = push_directory(args.directory, args.repo_id, private=args.private, evaluation=args.evaluation)
    console.print(f"pushed {args.directory} to {url}", highlight=False, markup=False, soft_wrap=True)


def convert_wan(words: Sequence[str]) -> None:
    """Turn original Wan or Self-Forcing weights into a diffusers directory, or with --to-original the other way."""
    parser = argparse.ArgumentParser(prog="fv-distill convert-wan", description=convert_wan.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", required=True, metavar="PATH", help="a .pt, .pth or .safetensors file, or a directory of the latter"
    )
    parser.add_argument("--output", required=True, metavar="PATH", type=Path, help="the directory to write")
    parser.add_argument("--base-model", metavar="MODEL", help="the same network's diffusers directory or Hub id")
    parser.add_argument("--key", help="the checkpoint's entry (default: generator_ema, generator or model)")
    parser.add_argument(
        "--to-original", action="store_true", help="--input is a diffusers directory, --output a .safetensors file"
    )
    parser.add_argument(
        "--component", default="transformer", help="or transformer_2, the low-noise network of Wan 2.2 A14B"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the weights' own)")
    causal = parser.add_argument_group("causal networks, so that `fv-distill generate` can stream them")
    causal.add_argument("--chunk-size", type=int, metavar="N", help="latent frames per chunk; 3 in Self-Forcing")
    causal.add_argument("--sigmas", type=float, nargs="+", metavar="X", help="noise levels of a few-step one, from 1")
    causal.add_argument("--local-window", type=int, metavar="N", help="latent frames that a chunk looks back (all)")
    causal.add_argument("--sink-frames", type=int, default=0, metavar="N", help="first frames always in sight (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    if args.to_original and (args.base_model or args.key):
        parser.error("--to-original takes no --base-model and no --key: a diffusers directory has its own config")
    if not args.to_original and not args.base_model:
        parser.error("--base-model is required: the weights are checked against its config")
    if args.chunk_size is None and (args.sigmas or args.local_window or args.sink_frames):
        parser.error("--sigmas, --local-window and --sink-frames describe a causal network: add its --chunk-size")
    if args.chunk_size is not None and args.to_original:
        parser.error("--to-original takes no --chunk-size: an original file has no place for it")
    options: dict[str, Any] = {"component": args.component, "dtype": args.dtype, "overwrite": args.overwrite}
    with exit_on_user_error(debug=args.debug):
        from .export.convert_wan import causal_info, convert_wan_checkpoint, convert_wan_to_original

        if args.to_original:
            convert_wan_to_original(args.input, args.output, **options)
        else:
            if args.chunk_size is not None:
                names = ("chunk_size", "sigmas", "local_window", "sink_frames")
                options["streaming"] = causal_info(args.base_model, **{name: getattr(args, name) for name in names})
            convert_wan_checkpoint(args.input, args.output, base_model=args.base_model, key=args.key, **options)
    console.print(f"converted {args.input} to {args.output}", highlight=False, markup=False, soft_wrap=True)


def convert_matrixgame2(words: Sequence[str]) -> None:
    """Turn published Matrix-Game 2 weights into a directory that fv_distill trains, streams and samples."""
    parser = argparse.ArgumentParser(
        prog="fv-distill convert-matrixgame2", description=convert_matrixgame2.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--input", required=True, metavar="PATH", help="a .safetensors file of Skywork/Matrix-Game-2.0, or its folder"
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="the directory to write")
    parser.add_argument(
        "--base-model",
        required=True,
        metavar="MODEL",
        help="whose VAE and image encoder are taken: Wan-AI/Wan2.1-I2V-14B-480P-Diffusers or its directory",
    )
    parser.add_argument("--config", metavar="FILE", help="the published config.json (default: beside the weights)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the weights' own)")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", metavar="X", help="noise levels of a causal network (default: the published)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    with exit_on_user_error(debug=args.debug):
        from .export.convert_matrixgame2 import convert_matrixgame2_checkpoint

        names = ("base_model", "config", "dtype", "sigmas", "overwrite")
        convert_matrixgame2_checkpoint(args.input, args.output, **{name: getattr(args, name) for name in names})
    console.print(f"converted {args.input} to {args.output}", highlight=False, markup=False, soft_wrap=True)


def generate(words: Sequence[str]) -> None:
    """Make a video with a model: chunk by chunk with a causal student, else with its diffusers pipeline."""
    parser = argparse.ArgumentParser(prog="fv-distill generate", description=generate.__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="an export, a diffusers directory or a Hub id")
    parser.add_argument("--prompt", help="what to show; required by models that read text")
    parser.add_argument("--image", type=Path, metavar="FILE", help="the first frame, for models that go on from one")
    parser.add_argument(
        "--actions",
        type=Path,
        metavar="FILE",
        help=".npz or .json with `keyboard` [F, K] and `mouse` [F, 2], a row for each frame of the video",
    )
    parser.add_argument("--output", type=Path, default=Path("out.mp4"), metavar="FILE", help=".mp4 (default) or .gif")
    parser.add_argument("--stream", action="store_true", help="print each chunk's latency; causal students only")
    parser.add_argument("--num-frames", type=int, metavar="N", help="default: as long as the training clips")
    parser.add_argument("--num-inference-steps", type=int, metavar="N", help="of a model that was not distilled")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="default: 1 (none) for a distilled student, else the model's"
    )
    parser.add_argument("--negative-prompt", default="", help="what guidance's other pass reads (default: nothing)")
    parser.add_argument("--height", type=int, help="in pixels (default: the training clips')")
    parser.add_argument("--width", type=int, help="in pixels (default: the training clips')")
    parser.add_argument("--fps", type=float, default=16, help="of the file (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--device", help="default: an accelerator where there is one")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    with exit_on_user_error(debug=args.debug):
        from .generate import generate_video

        generate_video(args)


def report(words: Sequence[str]) -> None:
    """Make one HTML page of a run, finished or not: curves, losses by noise level, validation, config."""
    parser = argparse.ArgumentParser(prog="fv-distill report", description=report.__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the training.output_dir of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page to write (default: report.html in RUN_DIR)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    with exit_on_user_error(debug=args.debug):
        from .report.page import write_report

        path = write_report(args.run_dir, args.output)
    console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def estimate(words: Sequence[str]) -> None:
    """Say what a run will take before it is launched: parameters, memory, network calls, arithmetic, time, disk."""
    parser = argparse.ArgumentParser(
        prog="fv-distill estimate",
        description=estimate.__doc__,
        epilog="other options are dotted overrides of the config, such as --training.data.train_batch_size 2",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument("--accelerate-config", metavar="FILE", help="accelerate launch's YAML (default: one GPU)")
    parser.add_argument("--num-processes", type=int, metavar="N", help="instead of accelerate's YAML")
    parser.add_argument("--device", default="H100", metavar="NAME", help="what each process runs on (default: H100)")
    parser.add_argument(
        "--device-memory", type=float, default=80, metavar="GIB", help="of each device, in GiB (default: 80)"
    )
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of the device, instead of the known rate")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOP utilisation of the run (default: 0.4)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args, overrides = parser.parse_known_args(words)
    with exit_on_user_error(debug=args.debug):
        from .config.load import load_run_config
        from .training.estimating import run_estimate

        run_estimate(load_run_config(args.config, overrides), args)


def evaluate(words: Sequence[str]) -> None:
    """Compare a student with its teacher, or with real clips, on the same prompts and the same noise."""
    from .evaluation.command import run_command

    run_command(words, description=evaluate.__doc__)


def preprocess(words: Sequence[str]) -> None:
    """Turn videos with captions, or captions alone, into the rows that training reads."""
    from .preprocess.command import run_command

    run_command(words, description=preprocess.__doc__)


def inspect(words: Sequence[str]) -> None:
    """Show what a directory of rows holds, and decode some of its clips to one picture."""
    parser = argparse.ArgumentParser(prog="fv-distill inspect", description=inspect.__doc__, allow_abbrev=False)
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory of parquet rows, or one file")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows to show, evenly spread (default: 8)")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="clips to decode; 0 is none (default: 4)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture (default: contact_sheet.png in DIR)")
    parser.add_argument("--model", metavar="DIR", help="whose VAE decodes (default: the one that encoded)")
    parser.add_argument("--adapter", metavar="PATH", help="dotted path of the model's adapter (default: as it encoded)")
    parser.add_argument("--device", help="default: an accelerator where there is one")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    with exit_on_user_error(debug=args.debug):
        from .preprocess.inspect import inspect_rows

        inspect_rows(
            args.directory,
            num_rows=args.rows,
            num_samples=args.samples,
            output=args.output,
            model=args.model,
            adapter=args.adapter,
            device=args.device,
        )


def doctor(words: Sequence[str]) -> None:
    """Look at this machine and how processes would be started on it; status 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="fv-distill doctor", description=doctor.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs"), metavar="DIR", help="where runs go (default: outputs)"
    )
    parser.add_argument(
        "--accelerate-config",
        type=Path,
        metavar="FILE",
        help="the config for `accelerate launch` (default: the one that `accelerate config` wrote)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(words)
    from .doctor import run_doctor

    if not run_doctor(args.output_dir, accelerate_config=args.accelerate_config, as_json=args.json):
        raise SystemExit(1)


def demo(words: Sequence[str]) -> None:
    """Distil a tiny Wan teacher of handwritten digits into a few-step student, and measure both; minutes on a CPU."""
    parser = argparse.ArgumentParser(prog="fv-distill demo", description=demo.__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of the training run (default: 0)")
    parser.add_argument(
        "--fast", action="store_true", help="a few seconds, to see that everything runs; the student is bad"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/demo"), metavar="DIR", help="default: outputs/demo"
    )
    parser.add_argument("--lora", action="store_true", help="train a LoRA student too, and compare the two")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    args = parser.parse_args(words)
    with exit_on_user_error(debug=args.debug):
        script = demo_script()
    flags = [name for name, on in (("--fast", args.fast), ("--lora", args.lora), ("--debug", args.debug)) if on]
    # A process of its own: the demo launches training runs, and its seeds and threads are nobody else's.
    command = [sys.executable, str(script), "--seed", str(args.seed), "--output-dir", str(args.output_dir), *flags]
    status = subprocess.run(command, check=False).returncode
    if status:
        # Negative: ended by a signal, which a shell reports as 128 + its number.
        raise SystemExit(status if status > 0 else 128 - status)


def demo_script() -> Path:
    """The demo of the checkout that this package runs from.

    Raises:
        FileNotFoundError: if the package was installed without its checkout.
    """
    checkout = Path(fv_distill.__file__).resolve().parents[2]
    script = checkout / _DEMO_SCRIPT
    if not script.is_file():
        raise FileNotFoundError(
            f"the demo's teacher and data are not part of the installed package ({script} does not exist); clone the "
            "repository and run `make demo` in it"
        )
    return script


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "preprocess": (preprocess, "turn videos with captions into training rows"),
    "inspect": (inspect, "show what training rows hold, with a picture of some clips"),
    "train": (train, "train what a YAML file describes"),
    "make-trajectories": (make_trajectories, "make the teacher paths that knowledge distillation trains on"),
    "export": (export, "make a diffusers directory of a checkpoint"),
    "push": (push, "upload an export to the Hugging Face Hub"),
    "convert-wan": (convert_wan, "turn original Wan or Self-Forcing weights into a diffusers directory, or back"),
    "convert-matrixgame2": (
        convert_matrixgame2,
        "make a directory of published Matrix-Game 2 weights",
    ),
    "generate": (generate, "make a video with a model, streamed where it is causal"),
    "report": (report, "make one HTML page of a run"),
    "estimate": (estimate, "say what a run will take: memory, network calls, time"),
    "evaluate": (evaluate, "compare a student with its teacher: cost, distances, videos, a page"),
    "doctor": (doctor, "look at this machine: versions, devices, disk, several processes"),
    "demo": (demo, "distil and measure a student of handwritten digits"),
}
