"""All that is decided before anything is loaded: the ways, the prompts, the size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fv_distill.models.pretrained import parse_dtype, resolve_directory
from fv_distill.prompts import PROMPT_SUFFIXES, read_prompts

from .real_clips import RealClips
from .ways import REAL_NAME, ClipSize, Way, extra_ways, make_way, resolve_size, weights_fingerprint


@dataclass(frozen=True)
class Plan:
    """One evaluation.

    Attributes:
        ways: the reference first, then it in other step counts, the model last.
        prompts: texts.
        num_clips: of each prompt.
        size: of the clips.
        seed: of the noise.
        batch_size: clips at a time.
        negative_prompt: None is the pipeline's own.
        device: where models run.
        dtype: of their weights.
        real: the data set, where the reference is one.
        real_rows: for each prompt the rows that are compared with.
    """

    ways: tuple[Way, ...]
    prompts: tuple[str, ...]
    num_clips: int
    size: ClipSize
    seed: int
    batch_size: int
    negative_prompt: str | None
    device: torch.device
    dtype: torch.dtype
    real: RealClips | None = None
    real_rows: tuple[tuple[int, ...], ...] = ()

    @property
    def model(self) -> Way:
        """The way that is evaluated."""
        return self.ways[-1]

    def group_sizes(self, way: Way) -> list[int]:
        """How many clips of each prompt there are, in the order of the prompts."""
        if way.kind == "real":
            return [len(rows) for rows in self.real_rows]
        return [self.num_clips] * len(self.prompts)

    def clip_prompts(self, way: Way) -> list[str]:
        """The prompt of each clip: all clips of the first one, then those of the second."""
        pairs = zip(self.prompts, self.group_sizes(way), strict=True)
        return [prompt for prompt, count in pairs for _ in range(count)]

    def settings(self) -> dict[str, Any]:
        """What clips depend on beside their way."""
        return {
            "prompts": list(self.prompts),
            "num_clips": self.num_clips,
            "size": asdict(self.size),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "negative_prompt": self.negative_prompt,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def way_settings(self, way: Way) -> dict[str, Any]:
        """All that a way's clips depend on, the state of its files included."""
        described = {**asdict(way), "directory": str(way.directory.resolve())}
        return {**self.settings(), "way": described, "files": weights_fingerprint(way.directory)}


def make_plan(
    model: str | Path,
    reference: str | Path,
    prompts: Sequence[str],
    *,
    names: tuple[str, str],
    size: ClipSize,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    reference_steps: int | None,
    reference_guidance: float | None,
    extra_steps: Sequence[int],
    max_prompts: int | None,
    num_clips: int,
    seed: int,
    batch_size: int,
    negative_prompt: str | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> Plan:
    """Check and complete the arguments of `evaluate`; `names` are those of the model and of the reference.

    Raises:
        FileNotFoundError: if there is no such model, data set or file of prompts.
        ValueError: for options that don't fit each other or the models.
    """
    for name, count in (("num_clips", num_clips), ("batch_size", batch_size), ("max_prompts", max_prompts)):
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    model_name, reference_name = names
    directory = resolve_directory(model, name="model")
    last = make_way(
        model_name, directory, steps=num_inference_steps, guidance=guidance_scale, option="num_inference_steps"
    )
    real = _real_clips(reference)
    if real is None:
        first = make_way(
            reference_name,
            resolve_directory(reference, name="reference"),
            steps=reference_steps,
            guidance=reference_guidance,
            option="reference_steps",
        )
        ways = [first, *extra_ways(reference_name, first, extra_steps), last]
    else:
        if extra_steps or reference_steps is not None or reference_guidance is not None:
            raise ValueError("real clips have no steps and no guidance: leave reference_* and extra_steps out")
        ways = [Way(REAL_NAME, Path(reference).expanduser(), None, None, "real"), last]
    if len({way.name for way in ways}) < len(ways):
        raise ValueError(f"two rows would be called {last.name!r}; give another model_name or reference_name")
    texts = (_read_all(prompts) or ([] if real is None else real.captions))[:max_prompts]
    if not texts:
        raise ValueError("there are no prompts: give texts, or a file of them")
    chosen_device, chosen_dtype = _place(device, dtype)
    return Plan(
        ways=tuple(ways),
        prompts=tuple(texts),
        num_clips=num_clips,
        size=resolve_size(size, [last.directory, *(way.directory for way in ways if way.kind != "real")]),
        seed=seed,
        batch_size=batch_size,
        negative_prompt=negative_prompt,
        device=chosen_device,
        dtype=chosen_dtype,
        real=real,
        real_rows=() if real is None else tuple(map(tuple, real.choose(texts, num_clips))),
    )


def _real_clips(reference: str | Path) -> RealClips | None:
    """The rows at a path; None if it is no data set but a model."""
    path = Path(reference).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "model_index.json").is_file() and any(path.rglob("*.parquet"))):
        return RealClips(path)
    return None


def _read_all(prompts: Sequence[str]) -> list[str]:
    """Texts, with files of prompts replaced by what they hold."""
    if isinstance(prompts, str):
        prompts = [prompts]
    texts: list[str] = []
    for text in prompts:
        if Path(text).suffix in PROMPT_SUFFIXES:
            texts += read_prompts(Path(text), name="prompts")
        elif text.strip():
            texts.append(text)
        else:
            raise ValueError("a prompt is empty")
    return texts


def _place(device: str | torch.device | None, dtype: str | torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    chosen = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    if dtype is None:
        dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
    return chosen, parse_dtype(dtype)
