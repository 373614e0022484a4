"""Reading a run's config: YAML, dotted overrides, and errors that name the key, the value and the fix."""

import argparse
import difflib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from fv_distill.methods.options import OPTIONS_BY_TARGET

from .describe import describe_keys
from .schema import ConfigError, MethodConfig, RunConfig

Validated = TypeVar("Validated", bound=BaseModel)
Overrides = Sequence[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class CommandLine:
    """What a script was asked for besides its config."""

    dry_run: bool = False
    debug: bool = False


def load_run_config(path: str | Path, overrides: Overrides = None) -> RunConfig:
    """Read, override, resolve and check a config.

    Args:
        path: a YAML file; `${...}` is resolved by OmegaConf.
        overrides: `["--training.seed", "1", "--training.output_dir=out"]`, or a mapping of dotted keys. Values are YAML.

    Raises:
        ConfigError: for a file that can't be read, an unknown key (the nearest known one is suggested) or a bad value.
    """
    tree = _read_yaml(Path(path))
    try:
        dotted = OmegaConf.from_dotlist(_as_dotlist(overrides))
        merged = OmegaConf.to_container(OmegaConf.merge(tree, dotted), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, dict)
    lenient = merged.get("allow_unknown_keys") is True
    config = validate(RunConfig, merged, lenient=lenient)
    options_class = OPTIONS_BY_TARGET.get(config.method.target)
    if options_class is not None:
        options = validate(options_class, config.method.options, prefix="method", lenient=lenient)
        full = {"_target_": config.method.target, **options.model_dump(mode="json")}
        config.method = MethodConfig.model_validate(full)
    return config


def dump_run_config(config: RunConfig) -> str:
    """The resolved config as YAML that loads to the same config again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json", by_alias=True)))


def parse_run_config(
    description: str, *, method_target: str | None = None, argv: Sequence[str] | None = None
) -> tuple[RunConfig, CommandLine]:
    """The command line of a training script.

    Args:
        description: what `--help` says above the list of keys.
        method_target: the script's method; a config for another one is refused, and `--help` lists its options.
        argv: arguments; None takes the process's.
    """
    known, overrides = _parser(description, method_target).parse_known_args(argv)
    for flag, key in (
        ("resume_from_checkpoint", "training.checkpoint.resume_from_checkpoint"),
        ("output_dir", "training.output_dir"),
    ):
        if getattr(known, flag) is not None:
            overrides.append(f"{key}={getattr(known, flag)}")
    if known.overwrite:
        overrides.append("training.overwrite=true")
    command_line = CommandLine(dry_run=known.dry_run, debug=known.debug)
    from fv_distill.console import exit_on_user_error

    with exit_on_user_error(debug=known.debug):
        config = load_run_config(known.config, overrides)
        if method_target is not None and config.method.target != method_target:
            raise ConfigError(
                f"method._target_: {config.method.target}, but this script trains {method_target}; "
                "use its own script or `fv-distill train`"
            )
    return config, command_line


def validate(
    kind: type[Validated], data: Mapping[str, Any], *, prefix: str = "", lenient: bool = False
) -> Validated:
    """`kind.model_validate` with errors in our words.

    Args:
        kind: the pydantic model.
        data: plain values.
        prefix: dotted key of `data` in the config.
        lenient: warn of unknown keys and drop them.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        unknown = [problem for problem in error.errors() if problem["type"] == "extra_forbidden"]
        if lenient and unknown:
            for problem in unknown:
                warnings.warn(_describe(problem, kind, prefix), stacklevel=2)
            pruned = _without(data, [problem["loc"] for problem in unknown])
            return validate(kind, pruned, prefix=prefix, lenient=lenient)
        raise ConfigError("\n".join(_describe(problem, kind, prefix) for problem in error.errors())) from error


def _parser(description: str, method_target: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe_keys(method_target) if _wants_help() else None,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument("--resume-from-checkpoint", metavar="latest|DIR", help="continue a run exactly")
    parser.add_argument("--output-dir", metavar="DIR", help="where the run writes (training.output_dir)")
    parser.add_argument("--overwrite", action="store_true", help="replace another run in the output directory")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print config and sizes, train nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _wants_help() -> bool:
    return "-h" in sys.argv or "--help" in sys.argv


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        tree = OmegaConf.create(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: this is no valid YAML: {getattr(error, 'problem', error)}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{path}: a config is a mapping with the sections models, method and training")
    return tree


def _as_dotlist(overrides: Overrides) -> list[str]:
    """Overrides as `key=value` strings."""
    if overrides is None:
        return []
    if isinstance(overrides, Mapping):
        return [f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}" for key, value in overrides.items()]
    result: list[str] = []
    waiting: str | None = None
    for word in overrides:
        if waiting is not None:
            result.append(f"{waiting}={word}")
            waiting = None
        elif "=" in word:
            result.append(word.removeprefix("--"))
        elif word.startswith("--"):
            waiting = word.removeprefix("--")
        else:
            raise ConfigError(f"{word!r} is neither an option nor a dotted override such as --training.seed 1")
    if waiting is not None:
        raise ConfigError(f"--{waiting} has no value; write --{waiting} VALUE")
    return result


def _describe(problem: Any, kind: type[BaseModel], prefix: str) -> str:
    location = [str(part) for part in problem["loc"]]
    path = ".".join([prefix, *location] if prefix else location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path}{_suggestion(location, kind)}"
    if problem["type"] == "missing":
        return f"{path} is missing; the config has to set it"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = f"{path}={given!r}" if isinstance(given, str | int | float | bool | list | type(None)) else path
    return f"{shown}: {message[:1].lower()}{message[1:]}"


def _suggestion(location: Sequence[str], kind: type[BaseModel]) -> str:
    """The nearest of the keys that are known where an unknown one stands."""
    from .describe import fields_at

    fields = fields_at(kind, location[:-1])
    nearest = difflib.get_close_matches(location[-1], fields, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else f"; known keys here: {', '.join(fields)}"


def _without(data: Mapping[str, Any], locations: Sequence[Sequence[Any]]) -> dict[str, Any]:
    first = {location[0] for location in locations if len(location) == 1}
    deeper = {key: [location[1:] for location in locations if location[0] == key and len(location) > 1] for key in data}
    return {
        key: _without(value, deeper[key]) if deeper[key] else value for key, value in data.items() if key not in first
    }
