"""Names that import their module on first use, so that `import fv_distill` and `--help` don't wait for torch."""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Any


def attach(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` (PEP 562) of a package whose `names` live in its submodules.

    A public name that is also its submodule's name always means the object, in whatever order things are imported.

    Args:
        package: the package's `__name__`.
        names: submodule -> the public names it defines; an empty list makes the submodule itself reachable.
    """
    home = {name: module for module, public in names.items() for name in public}
    public = [*home, *(module for module in names if module not in home)]
    shared = {name for name, module in home.items() if name == module}
    if shared:
        sys.modules[package].__class__ = _package_class(shared)

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in home:
            value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        elif name in names:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: sorted(public), public


def _package_class(shared: Collection[str]) -> type[ModuleType]:
    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            # The import system binds a loaded submodule to its name here and would hide the object of that name.
            super().__setattr__(
                name, getattr(value, name) if name in shared and isinstance(value, ModuleType) else value
            )

    return Package
