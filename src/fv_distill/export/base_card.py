"""What the card of a base model says about its licence and its own origin."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from .student_info import is_hub_id

_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


@dataclass(frozen=True)
class BaseCard:
    """Of a base model, what its descendants' cards repeat.

    Attributes:
        hub_id: the base model's on the Hub; of a local directory the one that its own card names; None if unknown.
        license: as in its front matter, such as "apache-2.0" or "other"; None if it names none.
        license_name: of an "other" licence.
        license_link: of an "other" licence: an address, or a file that the export holds too.
        files: names of the licence files in its directory, which an export copies.
    """

    hub_id: str | None = None
    license: Any = None
    license_name: str | None = None
    license_link: str | None = None
    files: tuple[str, ...] = ()


def read_base_card(base_model: str, directory: Path) -> BaseCard:
    """The licence of a base model. Nothing is guessed: what its card doesn't say is None.

    Args:
        base_model: a Hub id or a directory.
        directory: where it lies on this disk.
    """
    data = _front_matter(directory / "README.md")
    hub_id = base_model if is_hub_id(base_model) else data.get("base_model")
    link = data.get("license_link")
    if isinstance(link, str) and "://" not in link and not _is_file_in(directory, link):
        link = f"https://huggingface.co/{base_model}/blob/main/{link}" if is_hub_id(base_model) else None
    return BaseCard(
        hub_id=hub_id if isinstance(hub_id, str) and is_hub_id(hub_id) else None,
        license=data.get("license"),
        license_name=data.get("license_name"),
        license_link=link,
        files=tuple(sorted(path.name for kind in _LICENCE_FILES for path in directory.glob(kind) if path.is_file())),
    )


def _is_file_in(directory: Path, name: str) -> bool:
    """Whether a card, which somebody else wrote, names a file of its own directory."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and (directory / name).is_file()


def copy_licence(base_card: BaseCard, directory: Path, output_dir: Path) -> None:
    """Put a base model's licence files into an export that holds nothing else of its directory."""
    link = base_card.license_link
    linked = {link} if isinstance(link, str) and "://" not in link else set()
    for name in sorted({*base_card.files, *linked}):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / name, output_dir / name)


def _front_matter(card: Path) -> dict[str, Any]:
    """A card's metadata; a card that can't be read says nothing."""
    if not card.is_file():
        return {}
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
