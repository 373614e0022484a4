"""The words of `fv-distill evaluate`; `--help` needs no torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fv_distill.console import exit_on_user_error


def run_command(words: Sequence[str], *, description: str | None) -> None:
    """Read the words and evaluate."""
    args = _parser(description).parse_args(words)
    options = {key: value for key, value in vars(args).items() if key not in ("debug", "model", "reference", "prompts")}
    with exit_on_user_error(debug=args.debug):
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from .run import evaluate

        # Bars of the loading, and WanPipeline's word on frame counts that come from the training.
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        evaluate(args.model, args.reference, args.prompts, **options)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fv-distill evaluate", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="an export, any diffusers directory or a Hub id")
    add(
        "--reference",
        required=True,
        metavar="DIR",
        help="the teacher's directory or Hub id, or parquet rows of real clips (a file or a directory)",
    )
    add(
        "--prompts",
        nargs="+",
        default=[],
        metavar="PROMPT",
        help="texts, or .txt, .json or .jsonl files of them; without it, the captions of real clips",
    )
    add("--max-prompts", type=int, metavar="N", help="take only the first prompts")
    add("--output", dest="output_dir", type=Path, default=Path("outputs/evaluation"), metavar="DIR",
        help="default: outputs/evaluation; clips that are there are kept")  # fmt: skip
    add("--num-clips", type=int, default=1, metavar="N", help="clips, and so noises, of each prompt (default: 1)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--overwrite", action="store_true", help="make anew the clips that were made with other settings")
    add("--debug", action="store_true", help="show tracebacks of errors")

    clips = parser.add_argument_group("clips").add_argument
    clips("--num-frames", type=int, metavar="N", help="default: as long as the model's training clips")
    clips("--height", type=int, help="in pixels (default: the training clips')")
    clips("--width", type=int, help="in pixels (default: the training clips')")
    clips("--negative-prompt", help="what guidance's other pass reads (default: the pipeline's own)")

    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--num-inference-steps", type=int, metavar="N", help="of a model that was not distilled")
    sampling("--guidance-scale", type=float, metavar="X", help="of the model; default: 1 for a few-step student")
    sampling("--reference-steps", type=int, metavar="N", help="default: its pipeline's")
    sampling("--reference-guidance", type=float, metavar="X", help="default: its pipeline's")
    sampling("--extra-steps", type=int, nargs="+", default=[], metavar="N", help="the reference in these steps as well")
    sampling("--batch-size", type=int, default=1, metavar="N", help="clips at a time of a pipeline (default: 1)")
    sampling("--device", help="default: an accelerator where there is one")
    sampling("--dtype", help="of the weights (default: bfloat16, on a CPU float32)")

    report = parser.add_argument_group("report").add_argument
    report("--clip-score", metavar="DIR", help="also score frames against prompts with this CLIP model")
    report("--num-videos", type=int, default=8, metavar="N", help="prompts to show (default: 8)")
    report("--fps", type=float, default=16, help="of the videos (default: 16)")
    report("--model-name", default="student", metavar="NAME", help="in the table (default: student)")
    report("--reference-name", default="teacher", metavar="NAME", help="in the table (default: teacher)")
    return parser
