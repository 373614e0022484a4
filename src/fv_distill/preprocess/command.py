"""The words of `fv-distill preprocess`; `--help` needs no torch."""

import argparse
import typing
from collections.abc import Sequence
from typing import Any

from pydantic.fields import FieldInfo

from fv_distill.config.validation import validate
from fv_distill.console import exit_on_user_error

from .options import PreprocessOptions

_GROUPS = {
    "input and output": "model data output adapter split caption_column video_column actions overwrite",
    "clips": "num_frames fps resolution buckets max_area crop clips_per_video",
    "encoding": "text_length text_dtype vae_dtype latent_dtype vae_tiling device",
    "work": "shard_rows decode_workers clip_timeout",
}
_EPILOG = (
    "`accelerate launch -m fv_distill preprocess ...` shares the work between processes, on one machine or several "
    "that see the same output directory. After a kill, the same command goes on with what is missing."
)


def run_command(words: Sequence[str], *, description: str | None) -> None:
    """Read the words and preprocess."""
    given = vars(_parser(description).parse_args(words))
    debug = given.pop("debug")
    with exit_on_user_error(debug=debug):
        options = validate(PreprocessOptions, {name.replace("_", "-"): value for name, value in given.items()})
        _check_pyav()
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from .run import preprocess

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        preprocess(options)


def _check_pyav() -> None:
    import importlib.util

    if importlib.util.find_spec("av") is None:
        raise ImportError("decoding videos needs PyAV: pip install 'fv_distill[video]'")


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fv-distill preprocess", description=description, epilog=_EPILOG, allow_abbrev=False
    )
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            _add(group, name, PreprocessOptions.model_fields[name])
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add(group: Any, name: str, field: FieldInfo) -> None:
    kind = field.annotation
    default = "" if field.is_required() or field.default in (None, False) else f" (default: {field.default})"
    words: dict[str, Any] = {
        "help": f"{(field.description or '').replace('null:', 'default:')}{default}".replace("%", "%%"),
        "required": field.is_required(),
        "default": argparse.SUPPRESS,
    }
    if kind is bool:
        words["action"] = "store_true"
    elif typing.get_origin(kind) is typing.Literal:
        words["choices"] = typing.get_args(kind)
    else:
        words["metavar"] = _METAVARS.get(name, "X" if "float" in str(kind) else "N" if "int" in str(kind) else "NAME")
        words["nargs"] = "+" if "list" in str(kind) else None
    group.add_argument(f"--{name.replace('_', '-')}", **words)


_METAVARS = {
    "model": "DIR",
    "data": "PATH",
    "output": "DIR",
    "adapter": "PATH",
    "resolution": "HxW",
    "buckets": "HxW",
    "max_area": "HxW",
}
