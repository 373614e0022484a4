import importlib
import sys

import pytest

PACKAGE = "lazy_package"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a submodule `same` that defines `same` and `other`, and an empty one `plain`."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from fv_distill._lazy import attach\n"
        "__getattr__, __dir__, __all__ = attach(__name__, {'same': ['same', 'other'], 'plain': []})\n"
    )
    (folder / "same.py").write_text("def same(): return 1\ndef other(): return 2\n")
    (folder / "plain.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(PACKAGE)
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def test_nothing_is_imported_before_it_is_used(package):
    assert f"{PACKAGE}.same" not in sys.modules
    assert package.other() == 2
    assert f"{PACKAGE}.same" in sys.modules
    assert f"{PACKAGE}.plain" not in sys.modules
    assert package.plain is sys.modules[f"{PACKAGE}.plain"]


@pytest.mark.parametrize("submodule_first", [True, False])
def test_a_name_shared_with_its_submodule_means_the_object(package, submodule_first):
    if submodule_first:
        importlib.import_module(f"{PACKAGE}.same")
    assert package.same() == 1
    importlib.import_module(f"{PACKAGE}.same")
    assert package.same() == 1


def test_names_are_listed_and_others_refused(package):
    assert dir(package) == ["other", "plain", "same"]
    assert package.__all__ == ["same", "other", "plain"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_every_public_name_of_the_library_exists():
    import fv_distill

    for part in fv_distill.__all__:
        module = getattr(fv_distill, part)
        for name in getattr(module, "__all__", []):
            assert getattr(module, name) is not None
