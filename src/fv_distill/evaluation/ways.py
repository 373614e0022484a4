"""The ways to make clips that an evaluation compares: which model, how many steps, how much guidance, which size."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fv_distill.export.call_arguments import needs_image, pipeline_of
from fv_distill.generation import DEFAULT_GUIDANCE, DEFAULT_STEPS
from fv_distill.models.pipeline_index import pipeline_class
from fv_distill.models.pretrained import load_vae_config

INFO_FILE = "fv_distill.json"
REAL_NAME = "real clips"
_WEIGHTS = (".safetensors", ".bin", ".json", ".parquet")


@dataclass(frozen=True)
class ClipSize:
    """What clips look like; None leaves it to the pipeline.

    Attributes:
        num_frames: frames of video.
        height: in pixels.
        width: in pixels.
        max_sequence_length: tokens that prompts are padded to.
    """

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        name: in the table.
        directory: of the model, or of the real clips.
        steps: the pipeline's step count; None for one that takes none.
        guidance: the guidance scale; None for a pipeline that takes none.
        kind: "pipeline", "stream" for a causal student, "real" for clips that are there.
        even_steps: replace a flow-match Euler scheduler by one with even steps, see `sampling`.
    """

    name: str
    directory: Path
    steps: int | None
    guidance: float | None
    kind: Literal["pipeline", "stream", "real"] = "pipeline"
    even_steps: bool = False


def read_info(directory: Path) -> dict[str, Any]:
    """What an export of this library says of itself; nothing for other directories."""
    path = directory / INFO_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def make_way(name: str, directory: Path, *, steps: int | None, guidance: float | None, option: str) -> Way:
    """A model in its own number of steps, or in the given one.

    Args:
        name: of the model; the step count is added to it.
        directory: its directory.
        steps: None is the trained number of a few-step student, and otherwise the pipeline's default.
        guidance: None is 1 for a few-step student, and otherwise the pipeline's default.
        option: what messages call the step count.

    Raises:
        ValueError: for a model that needs images, for fewer than one step, or for a number that a few-step student was
            not trained for.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"{option}={steps} must be at least 1")
    info = read_info(directory)
    if info.get("sigmas") is not None:
        trained = len(info["sigmas"])
        if steps not in (None, trained):
            raise ValueError(f"{option}={steps}, but {directory} was distilled to {trained} steps; leave it out")
        # What a student was exported with; a pipeline whose guidance is a component of its own takes none.
        guidance = info["call"].get("guidance_scale") if guidance is None else guidance
        steps = trained
    causal = bool(info.get("causal"))
    if not info.get("reads_text", True):
        raise ValueError(
            f"{directory} makes videos of images and actions; evaluate gives prompts alone and can't compare such "
            "models"
        )
    pipeline = None if causal else pipeline_of(directory)
    if pipeline is not None and needs_image(pipeline):
        raise ValueError(
            f"{directory} is a {pipeline.__name__}, which makes videos of first frames; evaluate gives prompts alone "
            "and can't compare such models"
        )
    steps = _default(directory, "num_inference_steps", causal=causal) if steps is None else steps
    guidance = _default(directory, "guidance_scale", causal=causal) if guidance is None else guidance
    return Way(_name(name, steps), directory, steps, guidance, "stream" if causal else "pipeline")


def _name(name: str, steps: int | None) -> str:
    return name if steps is None else f"{name}, {steps} step{'s' if steps > 1 else ''}"


def _default(directory: Path, argument: str, *, causal: bool) -> Any:
    """What a model is called with where nobody says; None if its pipeline takes no such argument."""
    if causal:
        return {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}[argument]
    parameter = inspect.signature(pipeline_class(directory).__call__).parameters.get(argument)
    return None if parameter is None else parameter.default


def extra_ways(name: str, reference: Way, steps: Sequence[int]) -> list[Way]:
    """The reference again in other step counts.

    Raises:
        ValueError: if the reference has only one right number of steps, or a count is not in use.
    """
    if steps and read_info(reference.directory).get("sigmas") is not None:
        raise ValueError(f"--extra-steps, but {reference.directory} was distilled to {reference.steps} steps")
    if steps and min(steps) < 1:
        raise ValueError(f"--extra-steps {' '.join(map(str, steps))}: counts start at 1")
    counts = [count for count in dict.fromkeys(steps) if count != reference.steps]
    return [
        Way(
            _name(name, count),
            reference.directory,
            count,
            reference.guidance,
            reference.kind,
            even_steps=reference.kind == "pipeline",
        )
        for count in counts
    ]


def resolve_size(given: ClipSize, directories: Sequence[Path]) -> ClipSize:
    """Fill in what isn't given from the first export that tells the size of its training clips.

    Raises:
        ValueError: for sizes below 1.
    """
    for name, value in asdict(given).items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for directory in directories:
        if call := read_info(directory).get("call"):
            known = {**call, "num_frames": frames_of_call(directory, call["num_frames"])}
            merged = {key: known.get(key) if value is None else value for key, value in asdict(given).items()}
            return ClipSize(**merged)
    return given


def frames_of_call(directory: Path, num_frames: int) -> int:
    """How many frames a pipeline makes that is called with `num_frames`; see `call_of_frames`."""
    factor = temporal_factor(directory)
    if factor is None:
        return num_frames
    return 1 + (num_frames - (1 if factor > 1 else 0)) // factor * factor


def call_of_frames(directory: Path, num_frames: int) -> int:
    """The `num_frames` with which a pipeline makes at least so many frames.

    Pipelines over Wan's VAE round down to a multiple of its temporal factor and add 1, which is one too many without
    temporal folding.
    """
    factor = temporal_factor(directory)
    if factor is None:
        return num_frames
    return -(-(num_frames - 1) // factor) * factor + (1 if factor > 1 else 0)


def temporal_factor(directory: Path) -> int | None:
    """Frames of video per latent frame after the first, of Wan's VAE; None for others."""
    factor = load_vae_config(directory).get("scale_factor_temporal")
    return None if factor is None else int(factor)


def weights_fingerprint(directory: Path) -> Mapping[str, list[int]]:
    """Sizes and times of the files that clips depend on, so that a new export under an old name is noticed."""
    paths = [directory] if directory.is_file() else directory.rglob("*")
    files = sorted(path for path in paths if path.suffix in _WEIGHTS and path.is_file())
    stats = {path.relative_to(directory).as_posix(): path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
