"""What there is to encode: videos in folders, HF data sets or lists of prompts, each behind the same few questions."""

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fv_distill.prompts import PROMPT_SUFFIXES, read_prompts

from .decode import BadClipError, Media
from .options import PreprocessOptions
from .text_cache import caption_hash

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .gif .mpg .mpeg .ts .m2ts .flv .wmv .ogv .3gp .y4m".split()  # noqa: SIM905
)
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
CAPTION_NAMES = ("caption", "text", "prompt")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")


class Source(ABC):
    """Items in a fixed order, each under a key that stays the same as long as the item does."""

    has_video = True
    fingerprint = ""
    """What tells this data from another under the same path, where that is known."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The item's name, unique; rows have it as `file_name`."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """The item's caption, not empty; raises `BadClipError` if there is none."""

    @abstractmethod
    def media(self, index: int) -> Media | None:
        """Where the item's frames are; None for text alone. Raises `BadClipError` if they aren't there."""

    def actions_file(self, index: int) -> Path | None:
        """The item's .npz or .json of actions, if there is one."""
        return None


class FolderSource(Source):
    """A folder of videos, of folders of pictures, or both, searched recursively.

    A caption is in `metadata.csv` or `metadata.jsonl` (as HF's `videofolder` has them: `file_name`, relative to it, and
    a caption), or in a .txt or .json of the video's name. Listed files that are not there, and files without a caption,
    are items too: they are to be reported.

    Args:
        root: the folder.
        caption_column: of the metadata; None takes the first of `CAPTION_NAMES`.
        single_pictures: whether every picture is a clip of its own, instead of every folder of pictures.

    Raises:
        ValueError: for metadata without the columns, or a folder without any video.
    """

    def __init__(self, root: Path, *, caption_column: str | None = None, single_pictures: bool = False) -> None:
        self._root = root
        self._captions = _read_metadata(root, caption_column)
        self._caption_column = caption_column
        found = _find_clips(root, single_pictures=single_pictures)
        self._keys = sorted(found | self._captions.keys(), key=_natural)
        if not self._keys:
            raise ValueError(f"data: {root} has no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) and no metadata.csv")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return self._keys[index]

    def caption(self, index: int) -> str:
        """See `Source.caption`."""
        key = self._keys[index]
        if key in self._captions:
            return checked_caption(self._captions[key])
        for path in self._sidecars(key, ".txt", ".json"):
            try:
                text = path.read_text(encoding="utf-8")
                given = json.loads(text) if path.suffix == ".json" else text
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise BadClipError("unreadable caption", f"{path.name}: {error}") from error
            if not isinstance(given, dict):
                return checked_caption(given)
            names = (self._caption_column,) if self._caption_column else CAPTION_NAMES
            held = next((given[name] for name in names if name in given), None)
            if held is not None:
                return checked_caption(held)
        raise BadClipError("no caption", "there is no .txt or .json of its name, and no metadata names it")

    def media(self, index: int) -> Media:
        """See `Source.media`."""
        path = self._root / self._keys[index]
        if path.is_dir():
            return tuple(sorted(_pictures_in(path), key=lambda picture: _natural(picture.name)))
        if not path.is_file():
            raise BadClipError("missing file", "the metadata names it, but it does not exist")
        return (path,) if path.suffix.lower() in PICTURE_SUFFIXES else path

    def actions_file(self, index: int) -> Path | None:
        """See `Source.actions_file`."""
        return next(self._sidecars(self._keys[index], ".npz", ".json"), None)

    def _sidecars(self, key: str, *suffixes: str) -> Iterator[Path]:
        path = self._root / key
        stem = path.name if path.is_dir() else path.stem
        yield from (beside for suffix in suffixes if (beside := path.with_name(f"{stem}{suffix}")).is_file())


class HFSource(Source):
    """The rows of an HF data set, read as they are needed.

    Args:
        dataset: with a column of captions, and one of videos or none.
        video_column: its name.
        caption_column: None takes the first of `CAPTION_NAMES`.
        root: what relative paths in the video column begin at.

    Raises:
        ValueError: for a data set without captions.
    """

    def __init__(self, dataset: Any, *, video_column: str, caption_column: str | None, root: Path) -> None:
        from datasets import Video

        names = list(dataset.column_names)
        wanted = [caption_column] if caption_column else CAPTION_NAMES
        self._caption_column = next((name for name in wanted if name in names), None)
        if self._caption_column is None:
            raise ValueError(
                f"caption-column: the data set has none of {', '.join(wanted)}; its columns are {', '.join(names)}"
            )
        self.has_video = video_column in names
        if self.has_video and isinstance(dataset.features[video_column], Video):
            dataset = dataset.cast_column(video_column, Video(decode=False))
        self.fingerprint = str(dataset._fingerprint)
        self._captions = dataset.select_columns([self._caption_column])
        self._videos = dataset.select_columns([video_column]) if self.has_video else None
        self._video_column, self._root = video_column, root

    def __len__(self) -> int:
        return len(self._captions)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return f"row-{index:08d}"

    def caption(self, index: int) -> str:
        """See `Source.caption`."""
        return checked_caption(self._captions[index][self._caption_column])

    def media(self, index: int) -> Media | None:
        """See `Source.media`."""
        if self._videos is None:
            return None
        value = self._videos[index][self._video_column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not (path := self._root / value).is_file():
            raise BadClipError("missing file", f"column {self._video_column} has {value!r:.80}")
        return path


class PromptSource(Source):
    """Texts alone. A text's key follows from it, so that a changed file is noticed line by line."""

    has_video = False

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return f"prompt-{index:08d}-{caption_hash(self._prompts[index])[:8]}"

    def caption(self, index: int) -> str:
        """See `Source.caption`."""
        return checked_caption(self._prompts[index])

    def media(self, index: int) -> None:
        """See `Source.media`."""
        return None


def open_source(options: PreprocessOptions) -> Source:
    """What `data` names.

    Raises:
        FileNotFoundError: if it is nothing that is there, or can be had from the Hub.
        ValueError: for a folder without clips or captions.
    """
    path = Path(options.data).expanduser()

    def rows(dataset: Any, root: Path) -> HFSource:
        return HFSource(dataset, root=root, video_column=options.video_column, caption_column=options.caption_column)

    if path.is_file():
        if path.suffix not in PROMPT_SUFFIXES:
            raise ValueError(f"data: {path} is no folder and no file of prompts ({', '.join(PROMPT_SUFFIXES)})")
        return PromptSource(read_prompts(path, name="data"))
    if path.is_dir():
        dataset = _saved_dataset(path, options.split)
        if dataset is not None:
            return rows(dataset, path)
        single = options.num_frames == 1
        return FolderSource(path, caption_column=options.caption_column, single_pictures=single)
    if options.data.count("/") != 1 or options.data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data: {options.data} does not exist (a Hub id would look like owner/name)")
    return rows(_hub_dataset(options.data, options.split), Path.cwd())


def _saved_dataset(path: Path, split: str) -> Any | None:
    """A data set in a directory: of `save_to_disk`, or parquet files and no videos; else None."""
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"split: {path} has no {split!r}, only {', '.join(loaded)}")
            return loaded[split]
        return loaded
    files = sorted(str(file) for file in path.rglob("*.parquet"))
    if files and not _find_clips(path, single_pictures=False):
        return datasets.load_dataset("parquet", data_files=files, split="train")
    return None


def _hub_dataset(name: str, split: str) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"data: {name!r} is no local path and could not be had from the Hub ({type(error).__name__}); check the "
            "spelling, your connection and `hf auth login`"
        ) from error


def checked_caption(value: Any) -> str:
    """A caption, or the first of a list of them, with its white space made plain.

    Raises:
        BadClipError: if there is no text.
    """
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise BadClipError("no caption", "it is empty" if value in ("", None) else f"{value!r:.60} is no text")
    return " ".join(value.split())


def _read_metadata(root: Path, caption_column: str | None) -> dict[str, Any]:
    """Key of the file -> caption, of all metadata files below `root`."""
    captions: dict[str, Any] = {}
    for path in sorted(file for name in METADATA_NAMES for file in root.rglob(name)):
        for number, row in enumerate(_metadata_rows(path), start=1):
            names = [caption_column] if caption_column else CAPTION_NAMES
            column = next((name for name in names if name in row), None)
            if "file_name" not in row or column is None:
                raise ValueError(
                    f"data: {path}, row {number} has the columns {', '.join(map(str, row))}; needed are file_name and "
                    f"{' or '.join(names)} (--caption-column names another)"
                )
            file = Path(path.parent / str(row["file_name"]))
            captions[file.relative_to(root).as_posix()] = row[column]
    return captions


def _metadata_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for line in file:
                if line.strip():
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else {}
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"data: {path} can't be read: {error}") from error


def _find_clips(root: Path, *, single_pictures: bool) -> set[str]:
    videos, folders = set(), set()
    for path in root.rglob("*"):
        suffix, inside = path.suffix.lower(), path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if suffix in VIDEO_SUFFIXES or (single_pictures and suffix in PICTURE_SUFFIXES):
            videos.add(inside)
        elif suffix in PICTURE_SUFFIXES and path.parent != root:
            folders.add(inside.parent)
    # Pictures beside videos are their thumbnails.
    return {path.as_posix() for path in videos | (folders - {path.parent for path in videos})}


def _pictures_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]


def _natural(name: str) -> list[tuple[int, str | int]]:
    """Orders 2.png before 10.png."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]
