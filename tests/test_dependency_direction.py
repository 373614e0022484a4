"""Which part of the library may import which; see CONTRIBUTING.md.

Imports are read from the source, those inside functions included, since a late import is a dependency all the same.
Only `if TYPE_CHECKING:` blocks are left out: they name types and never run.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fv_distill"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What may use nothing else of the library than the listed parts, `_lazy` and its own part.
ALLOWED_PARTS = {
    "rng": set(),
    "schedules": set(),
    "losses": set(),
    "rollouts": {"schedules", "models.base", "models.causal_base", "models.conditioning", "models.kv_cache", "rng"},
    "models": {"schedules", "rng", "lora"},
    "methods": {"losses", "rollouts", "schedules", "rng", "models.base", "models.causal_base", "models.conditioning"},
    # Written against the base classes; training/estimating.py puts a config's own classes in.
    "estimate": {
        *("methods.base", "methods.calls", "methods.options", "rollouts.ode", "rng", "console"),
        *("models.base", "models.causal_base", "models.conditioning", "models.pretrained", "models.quantization"),
        "models.transformers.block_causal",
    },
    "hardware": set(),
}
# Third parties that a part may use.
ALLOWED_LIBRARIES = {"rng": {"torch"}, "schedules": {"torch"}, "losses": {"torch"}, "rollouts": {"torch"}}
# What a part may not use, by dotted beginning.
FORBIDDEN = {
    "models": {"accelerate", "yaml", "omegaconf", "torch.optim"},
    "methods": {"accelerate", "yaml", "omegaconf", "torch.optim", "diffusers", "transformers", "datasets"},
    "data": {"accelerate", "fv_distill.methods", "fv_distill.training"},
    "export": {"accelerate", "fv_distill.methods"},
    # Reads a directory, on any machine.
    "report": {
        *("torch", "diffusers", "transformers", "accelerate"),
        *(f"fv_distill.{part}" for part in ("methods", "models", "training", "callbacks", "data", "export")),
    },
    "evaluation": {"accelerate", *(f"fv_distill.{part}" for part in ("methods", "training", "config", "callbacks"))},
    "config": {"accelerate", "torch", "fv_distill.methods", "fv_distill.models", "fv_distill.training"},
    "training": {"fv_distill.methods", "fv_distill.models"},
    "callbacks": {"fv_distill.methods", "fv_distill.models"},
    "preprocess": {f"fv_distill.{part}" for part in ("methods", "training", "callbacks", "losses", "rollouts")},
}
# Exceptions to FORBIDDEN: the torch-free option fields, and the base classes that a trainer is written against.
PERMITTED = {
    "config": {"fv_distill.methods.options"},
    "training": {
        "fv_distill.methods.base",
        "fv_distill.methods.options",
        "fv_distill.models.base",
        "fv_distill.models.causal_base",
        "fv_distill.models.conditioning",
        "fv_distill.models.pipeline_index",
        "fv_distill.models.quantization",
    },
    "callbacks": {
        "fv_distill.methods.base",
        *(f"fv_distill.models.{name}" for name in ("base", "causal_base", "conditioning")),
    },
    "evaluation": {"fv_distill.callbacks.video_files"},
    "preprocess": {"fv_distill.callbacks.video_files"},
}
NO_CONCRETE_MODEL = {"data", "export", "evaluation"}
MODEL_BASES = {
    f"fv_distill.models.{name}"
    for name in ("base", "causal_base", "conditioning", "pretrained", "pipeline_index", "quantization")
}
FAMILIES = {
    *("wan", "wan_causal", "hunyuan", "cosmos", "longcat", "matrixgame2", "matrixgame2_causal", "kandinsky5", "ltx2")
}


def imports_of(source: str, package: list[str]) -> Iterator[str]:
    """Dotted names that a module of `package` imports when it runs."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import submodule` depends on the submodule, `from module import name` on the module.
            yield from (_as_module(f"{module}.{alias.name}", module) for alias in node.names)


def _as_module(name: str, otherwise: str) -> str:
    below = ROOT / "src" / Path(*name.split("."))
    return name if below.is_dir() or below.with_suffix(".py").is_file() else otherwise


def read_imports(path: Path) -> set[str]:
    return set(imports_of(path.read_text(), ["fv_distill", *path.relative_to(PACKAGE).parts[:-1]]))


def is_below(name: str, beginnings: set[str]) -> bool:
    return any(name == beginning or name.startswith(f"{beginning}.") for beginning in beginnings)


def violations(part: str, imports: set[str]) -> list[str]:
    """The imports that a part of the library may not have."""
    names = sorted(imports)
    inner = [name for name in names if is_below(name, {"fv_distill"}) and not is_below(name, {"fv_distill._lazy"})]
    found = [name for name in names if name.split(".")[0] in {"examples", "benchmarks", "tests"}]
    if part in ALLOWED_PARTS:
        allowed = {f"fv_distill.{other}" for other in ALLOWED_PARTS[part] | {part}}
        found += [name for name in inner if not is_below(name, allowed)]
    if part in ALLOWED_LIBRARIES:
        found += [name for name in names if name not in inner and not _is_standard(name, ALLOWED_LIBRARIES[part])]
    if part in FORBIDDEN:
        permitted = PERMITTED.get(part, set())
        found += [name for name in names if is_below(name, FORBIDDEN[part]) and not is_below(name, permitted)]
    if part in NO_CONCRETE_MODEL:
        found += [name for name in inner if is_below(name, {"fv_distill.models"}) and not is_below(name, MODEL_BASES)]
    if part not in {"training", "callbacks", "preprocess"}:
        found += [name for name in names if is_below(name, {"accelerate"})]
    return found


def _is_standard(name: str, libraries: set[str]) -> bool:
    top = name.split(".")[0]
    return top in sys.stdlib_module_names or top in libraries or is_below(name, {"fv_distill._lazy"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_direction(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert violations(part, read_imports(path)) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_model_families_do_not_build_on_each_other(path):
    others = {name.split(".")[2] for name in read_imports(path) if name.startswith("fv_distill.models.")} & FAMILIES
    # A causal variant, and one that is given images, builds on its own family.
    assert others - {path.stem} <= {path.stem.removesuffix("_causal").removesuffix("_image")}


@pytest.mark.parametrize("part", ["rollouts", "methods", "training", "losses", "schedules"])
def test_no_family_is_named_where_all_are_served(part):
    family = re.compile(r"\bWan\b|Wan(?=[A-Z])|Hunyuan|Cosmos|LongCat|Matrix.?Game|Kandinsky|LTX")
    found = [(path.name, line) for path in (PACKAGE / part).rglob("*.py") for line in family.findall(path.read_text())]
    assert found == []


def test_the_reader_sees_relative_late_and_conditional_imports_but_not_those_of_types():
    source = """
from typing import TYPE_CHECKING
from . import finetune
from ..models.wan import WanModel
from fv_distill import training, __version__
if TYPE_CHECKING:
    import accelerate
def late():
    if True:
        import torch.optim as optim
"""
    found = set(imports_of(source, ["fv_distill", "methods"]))
    assert found == {
        *("typing", "torch.optim", "fv_distill"),
        *("fv_distill.methods.finetune", "fv_distill.models.wan", "fv_distill.training"),
    }
    wrong = {"fv_distill.models.wan", "fv_distill.training", "fv_distill", "torch.optim"}
    assert set(violations("methods", found)) == wrong
    assert violations("rollouts", {"numpy", "math", "fv_distill.schedules.flow"}) == ["numpy"]
    assert violations("config", {"fv_distill.methods.options", "fv_distill.methods.dmd2"}) == [
        "fv_distill.methods.dmd2"
    ]
