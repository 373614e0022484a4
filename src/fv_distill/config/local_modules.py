"""Modules that lie beside a config, for the classes that its `_target_` entries name.

A config names code that is run, as a script does: train only from configs that you would run as scripts. To keep that
to what a config asks for, its folder is not put on `sys.path`. An importer at the end of Python's list finds modules
there, `name.py` and `name/__init__.py`: what is installed always wins, a stray folder such as `wandb/` is no module,
and no other folder is looked in. It comes into force with the first `_target_` that is not installed.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class _Finder:
    """Finds top-level modules in one folder; what is below them Python's own finders look up by the package's path."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.loaded: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Python's question for a module; `path` is None for a top-level one."""
        spec = self.spec_of(fullname) if path is None else None
        if spec is not None:
            self.loaded.add(fullname)
        return spec

    def spec_of(self, name: str) -> ModuleSpec | None:
        """The spec of a module or package with code in the folder."""
        spec = None if self.folder is None else PathFinder.find_spec(name, [str(self.folder)])
        return spec if spec is not None and spec.origin is not None else None


_finder = _Finder()


def search_beside(folder: Path | None) -> None:
    """Let the next targets be found in this folder too, and in no other; None is for configs that are no file.

    Modules of another config's folder are forgotten, as both may have one of the same name.
    """
    if folder == _finder.folder:
        return
    own = tuple(f"{name}." for name in _finder.loaded)
    for name in [name for name in sys.modules if name in _finder.loaded or name.startswith(own)]:
        del sys.modules[name]
    _finder.loaded.clear()
    _finder.folder = folder
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def offer(name: str) -> bool:
    """Bring the folder into force if it has a top-level module of this name, and say whether it has."""
    if _finder.spec_of(name) is None:
        return False
    if _finder not in sys.meta_path:
        sys.meta_path.append(_finder)
    # Files may have been written since Python last listed the folder.
    importlib.invalidate_caches()
    return True


def shadowed(name: str) -> str | None:
    """What to say of a module in the folder that is passed over for an installed one of its name, if there is one."""
    spec, installed = _finder.spec_of(name), sys.modules.get(name)
    if spec is None or installed is None or name in _finder.loaded:
        return None
    origin = installed.__spec__.origin if installed.__spec__ is not None else None
    if origin is not None and spec.origin is not None and Path(origin).resolve() == Path(spec.origin).resolve():
        return None
    return f"{spec.origin}, beside the config, is not used: {name!r} is also installed ({origin or 'a namespace'}), "


def places(name: str) -> str:
    """Where a top-level module was looked for, in words."""
    if _finder.folder is None:
        return "it is not installed and not on PYTHONPATH"
    return (
        f"it is not installed, not on PYTHONPATH, and the config's folder {_finder.folder} holds neither {name}.py nor "
        f"{name}/__init__.py"
    )
