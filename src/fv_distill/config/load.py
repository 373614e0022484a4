"""Reading and writing a run's config: YAML, interpolation, dotted overrides, checks."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fv_distill.methods.options import OPTIONS_BY_TARGET

from .local_modules import search_beside
from .overrides import Overrides, apply_overrides, refuse_secrets
from .schema import ConfigError, MethodConfig, RunConfig
from .targets import check_targets, options_class_of
from .validation import validate


def load_run_config(path: str | Path, overrides: Overrides = None, *, check_signatures: bool = True) -> RunConfig:
    """Read, override, resolve and check a config.

    Args:
        path: a YAML file; `${...}` is resolved by OmegaConf.
        overrides: `["--training.seed", "1", "--training.output_dir=out"]` with values in YAML, or a mapping from dotted
            keys to values.
        check_signatures: compare the keys that go to classes with the classes; needs the targets to be importable.

    Raises:
        ConfigError: for a file that can't be read, an unknown key (the nearest known one is suggested) or a bad value.
        ImportError: for a `_target_` that is neither installed nor beside the file.
    """
    text = _read(Path(path))
    folder = Path(path).resolve().parent
    search_beside(folder)
    merged = _resolved(_parse_yaml(path, text), overrides, path)
    lenient = merged.get("allow_unknown_keys") is True
    config = validate(RunConfig, merged, lenient=lenient)
    config.method = _with_all_options(config.method, lenient=lenient)
    if check_signatures:
        check_targets(config)
    config.keep_source(text, folder)
    return config


def dump_run_config(config: RunConfig) -> str:
    """The resolved config as YAML that loads to the same config again."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(config.model_dump(mode="json", by_alias=True))))


def _read(path: Path) -> str:
    if not path.is_file():
        reason = "is a directory, not a YAML file" if path.is_dir() else "does not exist"
        raise ConfigError(f"the config {path} {reason}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text file (byte {error.start} is not UTF-8); is it a YAML config?") from error


def _parse_yaml(path: str | Path, text: str) -> DictConfig:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            found = "nothing" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise ConfigError(
                f"{path} holds {found}; a config is a mapping with the sections models, method and training"
            )
        tree = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: no valid YAML: {getattr(error, 'problem', None) or error}") from error
    assert isinstance(tree, DictConfig)
    return tree


def _resolved(tree: DictConfig, overrides: Overrides, path: str | Path) -> dict[str, Any]:
    """The merged tree as plain values."""
    try:
        merged = apply_overrides(tree, overrides)
        refuse_secrets(merged)
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = f" {error.full_key}:" if error.full_key else ""
        raise ConfigError(f"{path}:{key} {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _with_all_options(method: MethodConfig, *, lenient: bool) -> MethodConfig:
    """The method section with every option checked and its default written out."""
    kind = OPTIONS_BY_TARGET.get(method.target) or options_class_of(method.target, where="method._target_")
    options = validate(kind, method.options, prefix="method", lenient=lenient)
    return MethodConfig.model_validate({"_target_": method.target, **options.model_dump(mode="json")})


def _escaped(value: Any) -> Any:
    """Literal `${` in strings, which a reader would take for an interpolation."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value
