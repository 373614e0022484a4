"""Files of prompts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_SUFFIXES = (".txt", ".json", ".jsonl")


@dataclass(frozen=True)
class Prompt:
    """One row of a file: a text, and the first frame of what it tells, if the row names one."""

    text: str
    image: Path | None = None


def read_prompts(path: Path, *, name: str = "prompts") -> list[str]:
    """The texts of a file of prompts; see `read_prompt_rows`."""
    return [row.text for row in read_prompt_rows(path, name=name)]


def read_prompt_rows(path: Path, *, name: str = "prompts") -> list[Prompt]:
    """The prompts of a .txt, .json or .jsonl file.

    Args:
        path: one prompt a line (.txt), or strings or rows with `caption` or `prompt` (.json, .jsonl). Rows may have the
            first frame's path as `image` (or `image_path`), relative to the file.
        name: what messages call it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another kind of file, a row without a caption, or a file without prompts.
    """
    where = f"{name}={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file")
    if path.suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"{where} must be a .txt, .json or .jsonl file")
    text = path.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
            rows = rows["data"] if isinstance(rows, dict) and "data" in rows else rows
        else:
            rows = lines if path.suffix == ".txt" else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{where} holds no prompts; write one a line, or a JSON list")
    return [_prompt(row, path.parent, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


def _prompt(row: Any, folder: Path, where: str) -> Prompt:
    text = (row.get("caption") or row.get("prompt")) if isinstance(row, dict) else row
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a text, or a mapping with a `caption` or a `prompt`, not {row!r:.80}")
    given = (row.get("image") or row.get("image_path")) if isinstance(row, dict) else None
    if given is None:
        return Prompt(text)
    if not isinstance(given, str):
        raise ValueError(f"{where}: image={given!r:.80} must be the path of an image")
    return Prompt(text, folder / Path(given).expanduser())
