import collections
import os.path
import sys
import types

import pytest

from fv_distill.config import ConfigError, instantiate, resolve_target
from fv_distill.config.instantiate import accepted_parameters


def add(first, second=2, *, third=3):
    return first + second + third


def test_a_dotted_path_is_resolved():
    assert resolve_target("os.path.join") is os.path.join
    assert resolve_target("collections.OrderedDict.fromkeys") == collections.OrderedDict.fromkeys


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.at.all", "no package 'nowhere'"),
        ("collections.OrderedDic", "collections has no 'OrderedDic'; did you mean OrderedDict"),
        ("fv_distill.methds.DMD2Method", "fv_distill has no 'methds'; did you mean methods"),
        ("fv_distill.methods.DMD2Methd", "fv_distill.methods has no 'DMD2Methd'; did you mean DMD2Method"),
        ("word", "no dotted path"),
        ("a..b", "no dotted path"),
    ],
)
def test_what_does_not_exist_is_named(path, message):
    with pytest.raises(ImportError) as caught:
        resolve_target(path)
    assert message in str(caught.value)
    assert path in str(caught.value)


def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"importing needs_more failed: .*missing_dependency"):
        resolve_target("needs_more.Thing")


def test_a_missing_dependency_is_not_taken_for_the_package_that_shares_its_beginning(tmp_path, monkeypatch):
    (tmp_path / "vid_tools.py").write_text("import vid\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="importing vid_tools failed"):
        resolve_target("vid_tools.Thing")


def test_instantiate_calls_the_target(monkeypatch):
    monkeypatch.setitem(sys.modules, "adders", types.SimpleNamespace(add=add))
    assert instantiate({"_target_": "adders.add", "first": 1}, third=10) == 13
    with pytest.raises(ConfigError, match="takes no 'thrid'; it takes third, first, second"):
        instantiate({"_target_": "adders.add", "first": 1, "thrid": 2})
    with pytest.raises(ConfigError, match=r"adders\.add needs first"):
        instantiate({"_target_": "adders.add"})
    with pytest.raises(ConfigError, match="no _target_ among the keys first"):
        instantiate({"first": 1})


class Base:
    def __init__(self, network, *, shift=1.0):
        self.shift = shift

    @classmethod
    def load(cls, path, *, dtype="float32", **options):
        return cls(path, **options)

    @classmethod
    def closed(cls, path):
        return cls(path)


class Family(Base):
    def __init__(self, network, *, guidance=6.0, **kwargs):
        super().__init__(network, **kwargs)
        self.guidance = guidance


class Renamed(Family):
    @classmethod
    def load(cls, path, *, length=8, **kwargs):
        return super().load(path, **kwargs)


def test_keywords_that_a_class_method_hands_on_are_known():
    """To the same method of its bases and to the constructors, whose required arguments it gives itself."""
    assert set(accepted_parameters(Family.load)) == {"path", "dtype", "guidance", "shift"}
    assert set(accepted_parameters(Renamed.load)) == {"path", "length", "dtype", "guidance", "shift"}
    assert set(accepted_parameters(Family.closed)) == {"path"}
    assert accepted_parameters(Family) is None and set(accepted_parameters(Base)) == {"network", "shift"}
    assert (
        instantiate({"_target_": f"{__name__}.Renamed.load", "path": 1, "guidance": 2.0, "shift": 3.0}).guidance == 2.0
    )
    with pytest.raises(ConfigError, match="takes no 'guidence'; it takes guidance"):
        instantiate({"_target_": f"{__name__}.Renamed.load", "path": 1, "guidence": 2.0})
    with pytest.raises(ConfigError, match="needs path"):
        instantiate({"_target_": f"{__name__}.Renamed.load"})
