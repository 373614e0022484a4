"""Validation clips and contact sheets as data URIs, as many as a page can hold."""

import base64
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

# Of all pictures and clips together, before base64 adds a third. Browsers open such a page without a wait.
MAX_BYTES = 24_000_000
MAX_FILE_BYTES = 4_000_000
MAX_STEPS = 12
MAX_CLIPS = 8
# A larger sheet is shown smaller and in a lossy format.
_MAX_SHEET_BYTES = 400_000
_MAX_SHEET_WIDTH = 1600
# Decoding a picture that says it is enormous would take the memory.
_MAX_SHEET_PIXELS = 100_000_000

_STEP = re.compile(r"step-(\d+)")
_CLIP = re.compile(r"(\d+)_(\d+)-steps\.(mp4|gif)")
_SHEET = re.compile(r"contact_sheet_(\d+)-steps\.png")
_TYPES = {"mp4": "video/mp4", "gif": "image/gif"}


@dataclass
class Clip:
    """One prompt's clip."""

    caption: str
    uri: str
    is_video: bool


@dataclass
class Validation:
    """What one validation step has to show."""

    step: int
    sheet: str = ""
    clips: list[Clip] = field(default_factory=list)


@dataclass
class Gallery:
    """The validations of one sampling, in the order of the steps.

    Args:
        sampling_steps: network calls per clip.
        validations: those that are shown.
        note: what is not.
    """

    sampling_steps: int
    validations: list[Validation]
    note: str = ""


class _Budget:
    """Counts the bytes that went into the page, and what did not fit."""

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes
        self.left_out = 0

    def embed(self, path: Path, media_type: str) -> str:
        return self._uri(path.read_bytes(), media_type)

    def embed_sheet(self, path: Path) -> str:
        content, media_type = _small_sheet(path)
        return self._uri(content, media_type) if content else self._refuse()

    def _uri(self, content: bytes, media_type: str) -> str:
        if len(content) > min(self.left, MAX_FILE_BYTES):
            return self._refuse()
        self.left -= len(content)
        return f"data:{media_type};base64,{base64.b64encode(content).decode()}"

    def _refuse(self) -> str:
        self.left_out += 1
        return ""


def read_galleries(folder: Path, *, max_bytes: int = MAX_BYTES) -> list[Gallery]:
    """The validations below a folder, by sampling, newest and oldest first served.

    Args:
        folder: holds `step-00000100` and so on; it need not exist.
        max_bytes: of all files together.
    """
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))}
    by_sampling: dict[int, dict[int, Path]] = {}
    for step, path in steps.items():
        for number in _samplings(path):
            by_sampling.setdefault(number, {})[step] = path
    prompts, share = _prompts(folder / "prompts.json"), max_bytes // max(1, len(by_sampling))
    return [_gallery(number, by_sampling[number], prompts, share) for number in sorted(by_sampling)]


def _gallery(sampling_steps: int, steps: dict[int, Path], prompts: list[str], max_bytes: int) -> Gallery:
    budget = _Budget(max_bytes)
    shown = _spread(sorted(steps), MAX_STEPS)
    validations = {step: Validation(step) for step in shown}
    # The end and the beginning say most, and sheets show all prompts.
    order = [shown[-1], *shown[:-1]]
    for step in order:
        path = steps[step] / f"contact_sheet_{sampling_steps}-steps.png"
        if path.is_file():
            validations[step].sheet = budget.embed_sheet(path)
    num_clips = 0
    for step in order:
        clips = sorted(path for path in steps[step].iterdir() if _is_clip(path, sampling_steps))
        num_clips = max(num_clips, len(clips))
        for path in clips[:MAX_CLIPS]:
            uri = budget.embed(path, _TYPES[path.suffix[1:]])
            if uri:
                index = int(path.name.split("_")[0])
                caption = prompts[index] if index < len(prompts) else f"prompt {index}"
                validations[step].clips.append(Clip(caption, uri, path.suffix == ".mp4"))
    return Gallery(sampling_steps, list(validations.values()), _note(len(steps), len(shown), num_clips, budget))


def _note(num_steps: int, num_shown: int, num_clips: int, budget: _Budget) -> str:
    notes = []
    if num_shown < num_steps:
        notes.append(f"{num_shown} of {num_steps} validations are shown.")
    if num_clips > MAX_CLIPS:
        notes.append(f"The first {MAX_CLIPS} of {num_clips} clips are shown; contact sheets hold more.")
    if budget.left_out:
        notes.append(f"{budget.left_out} files were left out, damaged or too large for this page.")
    return " ".join(notes)


def _samplings(step_folder: Path) -> set[int]:
    found = set()
    for path in step_folder.iterdir():
        if match := _SHEET.fullmatch(path.name):
            found.add(int(match[1]))
        elif match := _CLIP.fullmatch(path.name):
            found.add(int(match[2]))
    return found


def _is_clip(path: Path, sampling_steps: int) -> bool:
    match = _CLIP.fullmatch(path.name)
    return match is not None and int(match[2]) == sampling_steps


def _prompts(path: Path) -> list[str]:
    """What the clips show; runs of earlier versions did not write it down."""
    if not path.is_file():
        return []
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def _small_sheet(path: Path) -> tuple[bytes, str]:
    """A sheet as it is if it is small, else scaled and as WebP; nothing of one that can't be read."""
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as sheet:
            if sheet.width * sheet.height > _MAX_SHEET_PIXELS:
                return b"", ""
            sheet.load()
            if len(content) <= _MAX_SHEET_BYTES:
                return content, "image/png"
            small = sheet.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        # A run in progress may be writing it just now.
        return b"", ""
    small.thumbnail((_MAX_SHEET_WIDTH, small.height))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return buffer.getvalue(), "image/webp"
