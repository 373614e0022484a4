"""Where a model's shapes are read: its directory, the Hub's cache, or the configs of known models in this package."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_CONFIGS = Path(__file__).with_name("published_configs.json")


def published_models() -> dict[str, dict[str, Any]]:
    """The known models' configs by Hub id and path; what no size depends on is left out or made up.

    A model that is published in other names is known by where the example configs have its conversion.
    """
    return json.loads(_CONFIGS.read_text(encoding="utf-8"))


@contextmanager
def config_directory(init_from: str) -> Iterator[Path]:
    """A diffusers directory with a model's configs, with or without weights; nothing is downloaded.

    Raises:
        FileNotFoundError: if the model is neither a directory, nor in the Hub's cache, nor known.
    """
    path = Path(init_from).expanduser()
    if path.is_dir():
        yield path
        return
    cached = _cached(init_from)
    if cached is not None:
        yield cached
        return
    known = published_models()
    if init_from not in known:
        raise FileNotFoundError(
            f"init_from={init_from!r} is no local directory, is not in the Hub's cache, and its shapes are not known "
            f"here (known: {', '.join(known)}); give a diffusers directory, of which the config files are enough"
        )
    with TemporaryDirectory(prefix="fv-distill-") as directory:
        for name, content in known[init_from].items():
            file = Path(directory) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content), encoding="utf-8")
        yield Path(directory)


def _cached(init_from: str) -> Path | None:
    if init_from.count("/") != 1 or init_from.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    # Repositories without an index have their network in `dit`; see fv_distill.models.pipeline_index.
    for names in (("model_index.json", "transformer/config.json"), ("dit/config.json",)):
        found = [try_to_load_from_cache(init_from, name) for name in ("vae/config.json", *names)]
        paths = [Path(path) for path in found if isinstance(path, str)]
        if len(paths) == len(found):
            return paths[0].parents[1]
    return None
