"""Wan 2.2 A14B's two experts: which of a directory's networks is for which noise levels."""

from dataclasses import dataclass
from pathlib import Path

from .pipeline_index import read_index

# The pipeline's names of the networks.
HIGH, LOW = "transformer", "transformer_2"


@dataclass(frozen=True)
class Expert:
    """One network of a directory.

    Attributes:
        name: "high" or "low"; None where the directory has one network for all noise levels.
        component: the pipeline's name of the network.
        sigma_range: the noise levels that it is for.
        boundary_ratio: the level from which on the high-noise expert is called.
    """

    name: str | None = None
    component: str = HIGH
    sigma_range: tuple[float, float] = (0.0, 1.0)
    boundary_ratio: float | None = None


def has_two_experts(directory: Path) -> bool:
    """Whether a pipeline directory names a second transformer."""
    entry = read_index(directory).get(LOW)
    return entry is not None and entry[0] is not None


def choose_expert(directory: Path, name: str | None, boundary_ratio: float | None) -> Expert:
    """The network that `models.<role>.expert` and `models.<role>.boundary_ratio` choose.

    Args:
        directory: of the pipeline.
        name: "high", "low", or None for a directory with one network.
        boundary_ratio: None reads it from the directory.

    Raises:
        ValueError: if the directory has two and none is chosen, has one and one is, or the boundary is none.
    """
    if not has_two_experts(directory):
        if name is not None or boundary_ratio is not None:
            raise ValueError(
                f"expert={name} and boundary_ratio={boundary_ratio} choose one of two networks, but {directory} has "
                "one for all noise levels; remove the keys"
            )
        return Expert()
    boundary = read_index(directory).get("boundary_ratio") if boundary_ratio is None else boundary_ratio
    if boundary is None or not 0 < boundary < 1:
        raise ValueError(
            f"boundary_ratio={boundary} of {directory} must be a sigma between 0 and 1; set "
            "models.<role>.boundary_ratio (Wan 2.2 A14B: 0.875 for text-to-video, 0.9 for image-to-video)"
        )
    if name not in ("high", "low"):
        raise ValueError(
            f"expert={name}, but {directory} has two networks; set models.<role>.expert to high (sigma from "
            f"{boundary:g} up) or low (below {boundary:g}). A run trains one of them"
        )
    if name == "high":
        return Expert("high", HIGH, (boundary, 1.0), boundary)
    return Expert("low", LOW, (0.0, boundary), boundary)
