"""The README.md of an export: what it is, how it was made and how good it is, and a snippet that runs as it stands.

Two of its sections depend on what happens after the export, and are written anew by `refresh_model_card`: how to use
it (on the Hub it has another name) and its quality (it may have been measured). They stand between comments.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .base_card import BaseCard, read_base_card
from .markdown import code, image, table, text, video
from .run_record import ASSETS, EVALUATION_FILES, LOSS_CHART
from .sampling_snippet import sampling_snippet
from .student_info import StudentInfo, public_name

_SDE_NOTE = """
Between two steps the sample is noised afresh, and the pipeline draws that noise from torch's global generator:
`torch.manual_seed` fixes it, the pipeline's `generator` argument only fixes the start.
"""

_CAUSAL_NOTE = """
The network is block-causal: it generates chunk by chunk over a key-value cache, which needs `pip install fv_distill`.
Stock diffusers loads the weights, but its pipeline lets every frame see every other, which they were not trained for.
"""

# How the card calls what `training_record` gives.
_LABELS = {
    "data": "data",
    "steps": "steps",
    "updates": "updates of each network",
    "global_batch_size": "clips per step",
    "gradient_accumulation_steps": "gradient accumulation",
    "processes": "processes",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "seed": "seed",
}


def write_model_card(path: Path, info: StudentInfo, *, name: str, base: Path | None = None) -> None:
    """Write the card of the export called `name`, whose other files are in the card's directory already.

    Args:
        path: of the card.
        info: of the export.
        name: what the snippet loads: a directory beside which it is run, or a Hub id.
        base: the base model's directory, from whose card the licence is taken; None knows of no licence.
    """
    base_card = BaseCard() if base is None else read_base_card(info.base_model, base)
    directory = path.parent
    sections = [
        f"# {text(name.rpartition('/')[2])}",
        _summary(info, base_card),
        _section("use", _usage(info, name)),
        _section("quality", _quality(directory)),
        _samples(directory),
        _training(info, directory),
        _licence(info, base_card),
        _made_with(info),
    ]
    body = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{_metadata(info, base_card, directory).to_yaml()}\n---\n\n{body}\n").save(path)


def refresh_model_card(directory: Path, info: StudentInfo, *, name: str) -> None:
    """Bring the snippet's name and the quality table of a card of ours up to date; the rest, edited or not, stays."""
    path = directory / "README.md"
    before = card = path.read_text(encoding="utf-8")
    for section, body in (("use", _usage(info, name)), ("quality", _quality(directory))):
        pattern = re.escape(_opening(section)) + r".*?" + re.escape(_CLOSING)
        if found := re.search(pattern, card, re.DOTALL):
            card = card[: found.start()] + _section(section, body) + card[found.end() :]
    if card != before:
        path.write_text(card, encoding="utf-8")


_CLOSING = "<!-- end of fv_distill -->"


def _opening(section: str) -> str:
    return f"<!-- fv_distill {section}: written anew when the export is pushed -->"


def _section(name: str, body: str) -> str:
    return "\n".join(filter(None, [_opening(name), body, _CLOSING]))


def _metadata(info: StudentInfo, base: BaseCard, directory: Path) -> ModelCardData:
    """The front matter. `to_yaml` quotes what needs it and drops what is None."""
    kind = "image-to-video" if info.needs_image else _pipeline_tag(directory)
    is_lora = info.lora_weights is not None
    tags = ["diffusers", "video", kind, "distillation", "causal", "lora", "fv_distill"]
    applies = {"distillation": info.sigmas is not None, "causal": info.causal is not None, "lora": is_lora}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=kind,
        base_model=base.hub_id,
        # Without it the Hub calls every descendant a fine-tune.
        base_model_relation=("adapter" if is_lora else "finetune") if base.hub_id else None,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        tags=[tag for tag in tags if applies.get(tag, True)],
    )


def _pipeline_tag(directory: Path) -> str:
    index = directory / "model_index.json"
    pipeline = json.loads(index.read_text()).get("_class_name", "") if index.is_file() else ""
    return "image-to-video" if "ImageToVideo" in pipeline else "text-to-video"


def _summary(info: StudentInfo, base: BaseCard) -> str:
    kind = "LoRA for a video model" if info.lora_weights else "video model"
    what = (
        f"A fine-tuned {kind}."
        if info.sigmas is None
        else f"A {kind} that samples in {len(info.sigmas)} network calls."
    )
    name = public_name(info.base_model)
    linked = f"[{text(name)}](https://huggingface.co/{name})" if base.hub_id == name else code(name)
    lines = [f"- base model: {linked}", f"- method: {code(info.method)}, {info.step} steps"]
    if info.averaged:
        lines[-1] += ", averaged weights"
    if "boundary_ratio" in info.pipeline_config:
        boundary = info.pipeline_config["boundary_ratio"]
        lines.append(
            f"- trained: {code(info.component)}, one of two networks that part at sigma {boundary:g}; the other is "
            "the base model's"
        )
    if info.sigmas is not None:
        levels = ", ".join(f"{sigma:.6g}" for sigma in info.sigmas)
        lines.append(f"- noise levels: {levels}; guidance 1 (none); sampling: {info.sample_type}")
    return f"{what}\n\n" + "\n".join(lines)


def _usage(info: StudentInfo, name: str) -> str:
    note = ""
    if info.causal is not None:
        note = _CAUSAL_NOTE
    elif info.sigmas is not None and info.sample_type == "sde":
        note = _SDE_NOTE
    return f"## Use it\n\n```python\n{sampling_snippet(info, name=name)}\n```\n{note}".rstrip()


def _quality(directory: Path) -> str:
    """The table of the first evaluation file that there is."""
    for name in EVALUATION_FILES:
        if (directory / name).is_file():
            return f"## Quality\n\n{table(read_evaluation(directory / name))}"
    return ""


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation: `{"rows": [{...}, ...]}`.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    rows = content.get("rows") if isinstance(content, Mapping) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) and row for row in rows):
        raise ValueError(f'{path}: an evaluation is {{"rows": [{{"name": ..., "metric": ...}}, ...]}}')
    return [dict(row) for row in rows]


def _samples(directory: Path) -> str:
    """The validation clips in the export's assets."""
    assets = sorted((directory / ASSETS).glob("*")) if (directory / ASSETS).is_dir() else []
    shown = [path for path in assets if path.name != LOSS_CHART]
    # Sheets show many prompts at once, so they come first.
    shown.sort(key=lambda path: (path.suffix != ".png", path.name))
    lines = [
        video(f"{ASSETS}/{path.name}") if path.suffix == ".mp4" else image(path.stem, f"{ASSETS}/{path.name}")
        for path in shown
    ]
    return "\n\n".join(["## Samples", "The last validation of the run.", *lines]) if lines else ""


def _training(info: StudentInfo, directory: Path) -> str:
    if not info.training:
        return ""
    rows = [(label, _shown(info.training[key])) for key, label in _LABELS.items() if key in info.training]
    lines = ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    parts = ["## Training", "\n".join(lines)]
    options = {key: value for key, value in info.training.get("method_options", {}).items() if value is not None}
    if options:
        parts.append(
            "Options of the method: " + ", ".join(code(f"{key}: {value}") for key, value in options.items()) + "."
        )
    if (directory / ASSETS / LOSS_CHART).is_file():
        parts.append(image("losses over the steps", f"{ASSETS}/{LOSS_CHART}"))
    return "\n\n".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{text(str(key))} {text(str(inner))}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(code(str(item)) for item in value)
    return text(f"{value:g}" if isinstance(value, float) else str(value))


def _licence(info: StudentInfo, base: BaseCard) -> str:
    name = code(public_name(info.base_model))
    if base.license is None:
        said = (
            f"Unknown: the card of {name} names no licence. These weights are derived from that model, whose terms "
            "have to be looked up before they are used or passed on."
        )
    else:
        licence = ", ".join(map(str, base.license)) if isinstance(base.license, list) else str(base.license)
        full_name = f", {text(base.license_name)}" if base.license_name else ""
        link = f" ({text(base.license_link)})" if base.license_link else ""
        said = f"{text(licence)}{full_name}{link}, inherited from {name}."
    files = ", ".join(code(file) for file in base.files)
    return f"## Licence\n\n{said}" + (f" Copied from it: {files}." if files else "")


def _made_with(info: StudentInfo) -> str:
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in info.versions.items())
    return f"Made with fv_distill. Versions: {versions}." if versions else "Made with fv_distill."
