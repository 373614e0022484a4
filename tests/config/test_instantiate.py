import collections
import os.path
import sys
import types

import pytest

from fv_distill.config import ConfigError, instantiate, resolve_target


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
