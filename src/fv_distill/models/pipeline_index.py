"""What the parts of a pipeline directory are, and their classes: diffusers', or this library's where it has none.

A repository may be published without a `model_index.json`, with its network in a folder of another name. Those that are
known here count as pipeline directories all the same.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch

import fv_distill.models.pipelines
import fv_distill.models.transformers

INDEX_FILE = "model_index.json"
_OWN_NETWORKS = "fv_distill.models.transformers"
_LIBRARIES = ("diffusers", "transformers")
# Of a repository without an index: the class that its network's config names -> the index it would have.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "LongCatVideoTransformer3DModel": {
        "_class_name": "LongCatVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": [f"{_OWN_NETWORKS}.longcat", "LongCatVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
}
_PUBLISHED_FOLDER = "dit"


def is_pipeline_directory(directory: Path) -> bool:
    """Whether it has an index, or is a repository that is known without one."""
    return (directory / INDEX_FILE).is_file() or _published_index(directory) is not None


def read_index(directory: Path) -> dict[str, Any]:
    """The `model_index.json`, or what it would be.

    Raises:
        FileNotFoundError: if the directory is no pipeline's.
    """
    path = directory / INDEX_FILE
    if path.is_file():
        return json.loads(path.read_text())
    index = _published_index(directory)
    if index is None:
        raise FileNotFoundError(f"{directory} has no {INDEX_FILE}; give a diffusers directory")
    return index


def network_folder(directory: Path, component: str = "transformer") -> str:
    """The name of the folder that holds a network."""
    is_published = not (directory / INDEX_FILE).is_file() and _published_index(directory) is not None
    return _PUBLISHED_FOLDER if is_published and component == "transformer" else component


def component_class(directory: Path, component: str) -> Any:
    """The class of one part.

    Raises:
        ValueError: if the index has no such part, or names a class that neither diffusers, transformers nor this
            library has. A file that came from elsewhere must not choose what is imported.
    """
    index = read_index(directory)
    if not index.get(component):
        raise ValueError(f"{directory / INDEX_FILE} has no {component}; it has {', '.join(sorted(index))}")
    library, name = index[component]
    if library in _LIBRARIES and hasattr(importlib.import_module(library), name):
        return getattr(importlib.import_module(library), name)
    own = fv_distill.models.transformers
    if library.startswith(_OWN_NETWORKS) and name in own.__all__:
        return getattr(own, name)
    raise ValueError(f"{directory}: {component} is a {library}.{name}, which is not known here")


def own_network(name: str, config: Mapping[str, Any]) -> Any:
    """A network of this library, by its class and config, on the meta device."""
    with torch.device("meta"):
        return getattr(fv_distill.models.transformers, name).from_config(config)


def pipeline_class(directory: Path, pipeline_config: Mapping[str, Any] | None = None) -> Any:
    """The class of the pipeline, or the one that `pipeline_config` names in its stead.

    Args:
        directory: the pipeline directory.
        pipeline_config: what stands in the place of entries of its index.

    Raises:
        ValueError: if neither diffusers nor this library has it.
    """
    name = {**read_index(directory), **(pipeline_config or {})}["_class_name"]
    kind = find_pipeline(name)
    if kind is not None:
        return kind
    raise ValueError(f"{directory} is a {name}, which is no pipeline of diffusers {diffusers.__version__}")


def find_pipeline(name: str) -> Any:
    """The pipeline class of a name; None if neither diffusers nor this library has it."""
    if name in fv_distill.models.pipelines.__all__:
        return getattr(fv_distill.models.pipelines, name)
    return getattr(diffusers, name, None)


def own_pipeline(directory: Path, pipeline_config: Mapping[str, Any] | None = None) -> str | None:
    """The dotted path of the pipeline's class if it is this library's; None for diffusers' and those of others."""
    name = {**read_index(directory), **(pipeline_config or {})}["_class_name"]
    own = fv_distill.models.pipelines
    return f"{own.__name__}.{name}" if name in own.__all__ else None


@contextmanager
def indexed(directory: Path) -> Iterator[Path]:
    """The directory itself, or for one without an index links to its parts beside an index, while the block runs."""
    if (directory / INDEX_FILE).is_file():
        yield directory
        return
    index = read_index(directory)
    with TemporaryDirectory(prefix="fv-distill-") as name:
        view = Path(name)
        for component in (key for key in index if not key.startswith("_")):
            (view / component).symlink_to((directory / network_folder(directory, component)).resolve())
        write_index(view, index)
        yield view


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Write `model_index.json`."""
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _published_index(directory: Path) -> dict[str, Any] | None:
    config = directory / _PUBLISHED_FOLDER / "config.json"
    index = _PUBLISHED.get(json.loads(config.read_text()).get("_class_name")) if config.is_file() else None
    if index is None:
        return None
    tokenizer = directory / "tokenizer" / "tokenizer_config.json"
    name = json.loads(tokenizer.read_text()).get("tokenizer_class") if tokenizer.is_file() else None
    return index if name is None else {**index, "tokenizer": ["transformers", name]}
