"""The demo's tables and pictures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fv_distill.callbacks.video_files import encode_gif
from fv_distill.data.digits import CAPTIONS, FPS

SHOWN = 6
SCALE = 4
GAP = 6
LABEL_WIDTH = 220
HEADER = 22
# Of a row of results, what is not measured.
SET_UP = ("name", "steps", "guidance", "forward_passes")


def print_table(title: str, results: Mapping[str, Any]) -> None:
    """The rows and the bar, on the terminal."""
    measured = _measured(results)
    table = Table(title=f"{title}, seed {results['seed']}, {results['clips']} clips a row")
    for name in ("", "passes", *measured):
        table.add_column(name.replace("_", " "), justify="left" if name == "" else "right")
    for row in results["rows"]:
        table.add_row(row["name"], str(row["forward_passes"]), *(_figure(name, row[name]) for name in measured))
    console = Console(width=max(Console().width, 110))
    console.print(table)
    for name, value in results["bar"].items():
        console.print(f"{name}: {value}", highlight=False)
    console.print(f"seconds: {results['seconds']}", highlight=False)


def write_table(title: str, results: Mapping[str, Any], path: Path) -> None:
    """The same as Markdown."""
    measured = _measured(results)
    head = ["", "steps", "guidance", "network calls", *(name.replace("_", " ") for name in measured)]
    lines = [f"{title}, seed {results['seed']}, {results['clips']} clips a row; distances: less is better.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in results["rows"]:
        steps, guidance = ("" if row[key] is None else str(row[key]) for key in ("steps", "guidance"))
        figures = " | ".join(_figure(name, row[name]) for name in measured)
        lines.append(f"| {row['name']} | {steps} | {guidance} | {row['forward_passes']} | {figures} |")
    lines += ["", *(f"- {name}: {value}" for name, value in results["bar"].items())]
    path.write_text("\n".join(lines) + "\n")


def write_samples(clips: Mapping[str, Tensor], output: Path) -> None:
    """samples.png shows all frames side by side, samples.gif the clips in motion: same prompts, same noise."""
    chosen = np.linspace(0, len(CAPTIONS) - 1, SHOWN).round().astype(int)
    frames = {name: _frames(part[chosen]) for name, part in clips.items()}
    count = next(iter(frames.values())).shape[1]
    strips = {
        name: np.concatenate([_padded(part[:, f]) for f in range(count)], axis=2) for name, part in frames.items()
    }
    prompts = [CAPTIONS[index] for index in chosen]
    _grid(strips, prompts).save(output / "samples.png")
    moving = [
        np.asarray(_grid({name: _padded(part[:, f]) for name, part in frames.items()}, prompts)) for f in range(count)
    ]
    (output / "samples.gif").write_bytes(encode_gif(np.stack(moving), fps=FPS))


def write_curves(metrics_file: Path, path: Path) -> None:
    """Losses and gradient norms of the training run."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, prefix, title in ((axes[0], "loss/", "loss"), (axes[1], "grad_norm/", "gradient norm before clipping")):
        for role in ("critic", "student"):
            points = [(line["step"], line[prefix + role]) for line in lines if prefix + role in line]
            axis.plot(*zip(*points, strict=True), label=role, linewidth=0.8)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _measured(results: Mapping[str, Any]) -> list[str]:
    return [name for name in results["rows"][0] if name not in SET_UP]


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    digits = {"seconds": 1, "latency_first_chunk_s": 3, "frames_per_second": 0}.get(name, 2)
    return f"{value:.1%}" if name == "prompt_accuracy" else f"{value:.{digits}f}"


def _frames(clips: Tensor) -> np.ndarray:
    """uint8 `[N, F, H, W, 3]`, enlarged."""
    grey = ((clips[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return grey.repeat(SCALE, axis=2).repeat(SCALE, axis=3)[..., None].repeat(3, axis=-1)


def _padded(frames: np.ndarray) -> np.ndarray:
    return np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=90)


def _grid(columns: Mapping[str, np.ndarray], prompts: list[str]) -> Image.Image:
    """One column of pictures per way, one row per prompt."""
    height, width = next(iter(columns.values())).shape[1:3]
    font = ImageFont.load_default(12)
    wide = [max(width, int(font.getlength(name))) + GAP for name in columns]
    sheet = Image.new("RGB", (LABEL_WIDTH + sum(wide), HEADER + len(prompts) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        draw.text((GAP, HEADER + row * (height + GAP) + height // 2 - 6), prompt, fill="black", font=font)
    left = LABEL_WIDTH
    for (name, pictures), step in zip(columns.items(), wide, strict=True):
        draw.text((left, 4), name, fill="black", font=font)
        for row, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left, HEADER + row * (height + GAP)))
        left += step
    return sheet
