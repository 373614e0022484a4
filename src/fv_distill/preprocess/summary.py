"""What became of the items: rows, and those that were skipped with the reason, over all processes and restarts."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from .decode import BadClipError
from .shards import shard_files

SUMMARY_FILE = "summary.json"
_SHOWN_EXAMPLES = 5


@dataclass(frozen=True)
class Summary:
    """Of one output directory.

    Attributes:
        items: videos, or prompts, that the data has.
        rows: that are stored.
        shapes: of latents, as text -> rows with it.
        skipped: reason -> how many clips.
        skipped_clips: each of them: `clip`, `reason` and `detail`.
    """

    items: int
    rows: int
    shapes: dict[str, int]
    skipped: dict[str, int]
    skipped_clips: list[dict[str, str]]

    def write(self, directory: Path) -> None:
        """As `summary.json`."""
        partial = directory / f"{SUMMARY_FILE}.{os.getpid()}.tmp"
        partial.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, directory / SUMMARY_FILE)

    def lines(self) -> list[str]:
        """For a person."""
        shapes = ", ".join(f"{count} of {shape}" for shape, count in self.shapes.items())
        lines = [f"{self.rows} rows of {self.items} items" + (f": {shapes}" if shapes else "")]
        for reason, count in self.skipped.items():
            lines.append(f"skipped {count}: {reason}")
            chosen = [clip for clip in self.skipped_clips if clip["reason"] == reason]
            for clip in chosen[:_SHOWN_EXAMPLES]:
                lines.append(f"    {clip['clip']}" + (f" ({clip['detail']})" if clip["detail"] else ""))
            if len(chosen) > _SHOWN_EXAMPLES:
                lines.append(f"    and {len(chosen) - _SHOWN_EXAMPLES} more, see {SUMMARY_FILE}")
        return lines


class SkipLog:
    """Appends skipped clips to a rank's file as they come, so that a kill loses none."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._file: TextIO = (directory / f"skipped-{rank:05d}.jsonl").open("a", encoding="utf-8")
        self.count = 0

    def add(self, clip: str, error: BadClipError) -> None:
        """Note one clip by its row id."""
        line = json.dumps({"clip": clip, "reason": error.reason, "detail": error.detail}, ensure_ascii=False)
        # On a line of its own even behind one that a kill cut off.
        self._file.write(f"\n{line}\n")
        self._file.flush()
        self.count += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_skipped(directory: Path) -> dict[str, dict[str, str]]:
    """Clip -> its last entry in the logs of all ranks."""
    entries: dict[str, dict[str, str]] = {}
    # By age, so that the last word on a clip that was tried again, by whichever rank, is the one that counts.
    for path in sorted(directory.glob("skipped-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            entry = _parsed(line)
            if entry is not None:
                entries[entry["clip"]] = entry
    return entries


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        # Empty, or cut off by a kill: its clip was tried again.
        return None
    return entry if isinstance(entry, dict) and entry.keys() == {"clip", "reason", "detail"} else None


def summarise(directory: Path, *, num_items: int) -> Summary:
    """Read it from the finished files and the logs."""
    ids: set[str] = set()
    shapes: Counter[str] = Counter()
    for path in shard_files(directory):
        names = pq.read_schema(path).names
        shape = ["vae_latent_shape"] if "vae_latent_shape" in names else []
        table = pq.read_table(path, columns=["id", *shape])
        ids.update(table["id"].to_pylist())
        if shape:
            shapes.update(str(found) for found in table["vae_latent_shape"].to_pylist() if found)
    skipped = [entry for clip, entry in sorted(read_skipped(directory).items()) if clip not in ids]
    reasons = Counter(entry["reason"] for entry in skipped)
    return Summary(num_items, len(ids), dict(shapes.most_common()), dict(reasons.most_common()), skipped)
