"""`resume_from_checkpoint: auto`: the same command again goes on with its own run, and with no other."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fv_distill.config.load import load_run_config
from fv_distill.config.schema import ConfigError, RunConfig

from .checkpoint import complete_checkpoints
from .tracking import CONFIG_FILE

# Where a run lies and how it is gone on with are no part of what it computes.
_MAY_DIFFER = ("training.output_dir", "training.overwrite", "training.checkpoint.resume_from_checkpoint")
_SHOWN_KEYS = 5


def refuse_another_run(config: RunConfig, run_files: Sequence[str]) -> None:
    """See to it that what the output directory holds, if anything, was written by a run of the same config.

    A start that ended before its first checkpoint is then simply made again, over its own files.

    Args:
        config: of the run that starts, or starts again.
        run_files: names that a run writes into its output directory.

    Raises:
        FileExistsError: if the directory holds something else; the keys that differ are named.
    """
    directory = Path(config.training.output_dir)
    present = [name for name in run_files if (directory / name).exists()]
    if not present:
        return
    told = f"resume_from_checkpoint: auto goes on with the same run only, but {str(directory)!r}"
    written = directory / CONFIG_FILE
    if not written.is_file():
        raise FileExistsError(
            f"{told} holds {', '.join(present)} and no {CONFIG_FILE} that tells whose; choose another "
            "training.output_dir, or start once without auto and with --overwrite"
        )
    try:
        earlier = load_run_config(written, check_signatures=False)
    except (ConfigError, ImportError) as error:
        raise FileExistsError(f"{told} has a {CONFIG_FILE} that can't be read: {error}") from error
    changed = list(_differences(_comparable(earlier), _comparable(config)))
    if changed:
        more = f" and {len(changed) - _SHOWN_KEYS} more" if len(changed) > _SHOWN_KEYS else ""
        go_on = "continue it with the new values by --resume-from-checkpoint latest"
        start_over = "replace it by --overwrite instead of auto"
        raise FileExistsError(
            f"{told} holds a run with {', '.join(changed[:_SHOWN_KEYS])}{more}; "
            f"{go_on if complete_checkpoints(directory) else start_over}, or choose another training.output_dir"
        )


def _comparable(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json", by_alias=True)
    for dotted in _MAY_DIFFER:
        *parents, last = dotted.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        del section[last]
    return values


def _differences(earlier: Any, now: Any, key: str = "") -> Iterator[str]:
    """`key=value (now value)` for every leaf that isn't equal."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*earlier, *now]):
            missing = "no such key"
            yield from _differences(
                earlier.get(name, missing), now.get(name, missing), f"{key}.{name}" if key else str(name)
            )
    elif earlier != now:
        yield f"{key}={earlier!r} (now {now!r})"
