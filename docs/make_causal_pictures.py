"""Draw docs/images/causal_masks.png and causal_cache.png from the masks and the cache that the network uses.

python docs/make_causal_pictures.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap

from fv_distill.models import KVCache
from fv_distill.models.transformers.block_causal import ChunkLayout

IMAGES = Path(__file__).parent / "images"
FRAMES, CHUNK = 12, 3
COLOURS = ListedColormap(["#f4f4f2", "#3b6ea5", "#e08e45"])


def draw_masks() -> None:
    """Rows see columns."""
    layouts = [
        ("chunks of 3", ChunkLayout(CHUNK), 0),
        ("window 3, sink 1", ChunkLayout(CHUNK, local_window=3, sink_frames=1), 0),
        ("teacher forcing", ChunkLayout(CHUNK), FRAMES - CHUNK),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.9), gridspec_kw={"width_ratios": [12, 12, 16]})
    for axis, (title, layout, history) in zip(axes, layouts, strict=True):
        mask = layout.frame_mask(FRAMES, history).numpy().astype(int)
        own = ChunkLayout(CHUNK, local_window=0).frame_mask(FRAMES, history).numpy()
        axis.imshow(np.where(own & (mask > 0), 2, mask), cmap=COLOURS, vmin=0, vmax=2, aspect="equal")
        names = [f"c{frame}" for frame in range(history)] + [str(frame) for frame in range(FRAMES)]
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xticks(np.arange(-0.5, len(names)), minor=True)
        axis.set_yticks(np.arange(-0.5, len(names)), minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="both", length=0)
        if history:
            axis.axhline(history - 0.5, color="black", linewidth=1)
            axis.axvline(history - 0.5, color="black", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("is seen" + (" (c: clean copy)" if history else ""))
    axes[0].set_ylabel("latent frame that sees")
    for colour, label in ((2, "its own chunk"), (1, "the past")):
        axes[1].scatter([], [], marker="s", s=60, color=COLOURS(colour), label=label)
    axes[1].legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(IMAGES / "causal_masks.png", dpi=110, bbox_inches="tight")


def draw_cache() -> None:
    """What a rolling cache holds while chunks are written to it: frames are marked in the keys themselves."""
    sink, window, chunk = 1, 4, 2
    capacity = sink + window + chunk
    cache = KVCache(
        num_layers=1, batch_size=1, num_heads=1, head_dim=1, tokens_per_frame=1,
        capacity_frames=capacity, sink_frames=sink, local_window=window,
    )  # fmt: skip
    num_chunks = 7
    figure, axis = plt.subplots(figsize=(9, 4.2))
    for row in range(num_chunks):
        start = row * chunk
        with torch.no_grad():
            seen = {int(value) for value in cache.read(0, start)[0].flatten().tolist()}
        frames = torch.arange(start, start + chunk, dtype=torch.float32).view(1, chunk, 1, 1)
        cache.write(0, start, frames, frames)
        stored = range(start + chunk)
        for frame in stored:
            is_own = frame >= start
            colour = 2 if is_own else 1 if frame in seen else 0
            axis.add_patch(plt.Rectangle((frame, -row), 0.94, 0.86, color=COLOURS(colour)))
            shade = "white" if colour in (1, 2) else "black"
            axis.text(frame + 0.47, -row + 0.43, str(frame), ha="center", va="center", fontsize=8, color=shade)
        axis.text(-0.3, -row + 0.43, f"chunk {row}", ha="right", va="center", fontsize=9)
    labels = ((2, "the chunk"), (1, "seen: sink and window"), (0, "dropped"))
    for colour, label in labels:
        axis.scatter([], [], marker="s", s=60, color=COLOURS(colour), edgecolor="grey", linewidth=0.4, label=label)
    axis.set_xlim(-2, num_chunks * chunk + 0.5)
    axis.set_ylim(-num_chunks + 0.8, 1.3)
    axis.legend(loc="upper right", fontsize=8)
    axis.set_title(f"a rolling cache of {capacity} frames: sink {sink}, window {window}, chunks of {chunk}")
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(IMAGES / "causal_cache.png", dpi=110)


if __name__ == "__main__":
    draw_masks()
    draw_cache()
