"""Dotted overrides, `--training.seed 1`, and environment variables that a config may not read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from .schema import ConfigError

Overrides = Sequence[str] | Mapping[str, Any] | None

_ENV = re.compile(r"oc\.env:\s*([^,}\s]+)")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)


def apply_overrides(tree: DictConfig, overrides: Overrides) -> DictConfig:
    """A copy of the tree with the overrides merged in: mappings are merged, lists and scalars replaced.

    Args:
        tree: a config as read.
        overrides: words of a command line, `--a.b 1` or `--a.b=1`, with values in YAML; or a mapping from dotted keys
            to values.

    Raises:
        ConfigError: for a word that is no override, one without a value, and a value that is no YAML.
    """
    result = OmegaConf.create(tree)
    pairs = overrides.items() if isinstance(overrides, Mapping) else _parsed(overrides or ())
    for key, value in pairs:
        if not all(key.split(".")):
            raise ConfigError(f"--{key} is no dotted key such as --training.seed")
        OmegaConf.update(result, key, value, merge=True, force_add=True)
    return result


def refuse_secrets(tree: DictConfig) -> None:
    """Stop a config that reads a secret, since resolved configs are printed, saved and sent to trackers.

    Raises:
        ConfigError: naming the key and the variable.
    """
    for key, text in _strings(OmegaConf.to_container(tree, resolve=False), ""):
        for variable in _ENV.findall(text):
            if _SECRET.search(variable):
                raise ConfigError(
                    f"{key} reads the environment variable {variable}, which looks like a secret; configs are printed, "
                    "saved and logged, so leave it in the environment, where the library that needs it looks by itself"
                )


def _parsed(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--") and "=" not in word:
            raise ConfigError(f"{word!r} is neither an option nor a dotted override such as --training.seed 1")
        key, has_value, text = word.removeprefix("--").partition("=")
        if not has_value:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
        yield key, _parse_value(key, text)


def _parse_value(key: str, text: str) -> Any:
    # OmegaConf's own reader takes 1e-5 for the number that it is; plain YAML 1.1 asks for 1.0e-5.
    try:
        return OmegaConf.from_dotlist([f"value={text}"])._get_node("value")
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key} {text}: the value is no valid YAML") from error


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _strings(inner, f"{path}.{key}" if path else str(key))
