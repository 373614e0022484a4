"""The command line that every training script shares."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fv_distill.console import exit_on_user_error

from .describe import describe_keys
from .instantiate import resolve_target
from .load import load_run_config
from .schema import ConfigError, RunConfig
from .targets import describe_callbacks


@dataclass(frozen=True)
class CommandLine:
    """What a script was asked for besides its config."""

    dry_run: bool = False
    debug: bool = False


def parse_run_config(
    description: str | None,
    *,
    method_target: str | Sequence[str] | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> tuple[RunConfig, CommandLine]:
    """The command line of a training script; what a user can mend ends the process with status 2 and one message.

    Args:
        description: what `--help` says above the list of keys.
        method_target: the script's method or methods; a config for another one is refused, and `--help` lists their
            options.
        argv: arguments; None takes the process's.
        prog: the program's name in `--help`; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    targets = (method_target,) if isinstance(method_target, str) else tuple(method_target or ())
    # The list of keys is only made for --help, which is rarer than runs.
    epilog = _epilog(words, targets) if {"-h", "--help"} & set(words) else None
    known, overrides = _parser(description, epilog, prog).parse_known_args(words)
    # Quoted, because overrides are YAML and a path may look like anything.
    if known.resume_from_checkpoint is not None:
        overrides.append(f"--training.checkpoint.resume_from_checkpoint={json.dumps(known.resume_from_checkpoint)}")
    if known.output_dir is not None:
        overrides.append(f"--training.output_dir={json.dumps(known.output_dir)}")
    if known.overwrite:
        overrides.append("--training.overwrite=true")
    with exit_on_user_error(debug=known.debug):
        config = load_run_config(known.config, overrides)
        if targets:
            _check_method(config.method.target, targets)
    return config, CommandLine(dry_run=known.dry_run, debug=known.debug)


def _epilog(words: Sequence[str], targets: Sequence[str]) -> str:
    """The keys of every config, and, where a config is given too, the options of its own callbacks."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(words)[0].config
    text = describe_keys(targets)
    if path is None:
        return f"{text}\n\n--help with --config FILE also lists the options of the callbacks of that config"
    try:
        return f"{text}\n{describe_callbacks(load_run_config(path, check_signatures=False))}"
    except (ValueError, ImportError) as error:
        return f"{text}\n\nthe callbacks of {path} can't be listed: {error}"


def _check_method(given: str, expected: Sequence[str]) -> None:
    if given not in expected and resolve_target(given) not in [resolve_target(target) for target in expected]:
        raise ConfigError(
            f"method._target_={given!r}, but this script trains {' or '.join(expected)}; "
            "use that method's script or `fv-distill train`"
        )


def _parser(description: str | None, epilog: str | None, prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument(
        "--resume-from-checkpoint",
        metavar="latest|auto|DIR",
        help="continue a run exactly; auto starts it where there is no checkpoint yet, for unattended restarts",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="where the run writes (training.output_dir)")
    parser.add_argument("--overwrite", action="store_true", help="replace another run in the output directory")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, print config and sizes, train nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser
