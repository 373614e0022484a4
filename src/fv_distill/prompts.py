"""Files of prompts."""

import json
from pathlib import Path
from typing import Any

PROMPT_SUFFIXES = (".txt", ".json", ".jsonl")


def read_prompts(path: Path, *, name: str = "prompts") -> list[str]:
    """The prompts of a .txt, .json or .jsonl file.

    Args:
        path: one prompt a line (.txt), or strings or rows with `caption` or `prompt` (.json, .jsonl).
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
    return [_prompt(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


def _prompt(row: Any, where: str) -> str:
    prompt = (row.get("caption") or row.get("prompt")) if isinstance(row, dict) else row
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: expected a text, or a mapping with a `caption` or a `prompt`, not {row!r:.80}")
    return prompt
