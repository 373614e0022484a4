"""Which encoders a pipeline directory has: by the class in its model_index.json, or by an adapter that is named."""

import json
from pathlib import Path

from fv_distill.config.instantiate import resolve_target
from fv_distill.models.encoders import Encoders

ENCODERS_BY_PIPELINE = {
    "WanPipeline": "fv_distill.models.wan_encoders.WanEncoders",
}
"""`_class_name` of a diffusers pipeline -> its family's encoders."""


def encoders_class(directory: Path, adapter: str | None) -> type[Encoders]:
    """The encoders of a directory's family.

    Args:
        directory: a diffusers pipeline directory.
        adapter: dotted path of a model adapter whose `encoders_class` is taken instead.

    Raises:
        ValueError: for a pipeline of no known family.
        TypeError: for an adapter that is none.
        ImportError: for a path at which there is nothing.
    """
    if adapter is not None:
        found = resolve_target(adapter)
        if not isinstance(found, type) or not hasattr(found, "encoders_class"):
            raise TypeError(f"adapter: {adapter} is no model adapter: it has no encoders_class")
        return found.encoders_class
    name = json.loads((directory / "model_index.json").read_text()).get("_class_name")
    if name not in ENCODERS_BY_PIPELINE:
        raise ValueError(
            f"model: {directory} is a {name}; encoders are known for {', '.join(ENCODERS_BY_PIPELINE)}. "
            "Name the family's adapter with --adapter, such as fv_distill.models.WanModel"
        )
    return resolve_target(ENCODERS_BY_PIPELINE[name])
