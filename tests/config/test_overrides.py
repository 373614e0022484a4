import pytest
from omegaconf import OmegaConf

from fv_distill.config import ConfigError
from fv_distill.config.overrides import apply_overrides


def applied(overrides, tree=None):
    return OmegaConf.to_container(apply_overrides(OmegaConf.create(tree or {"a": {"b": 1, "c": [1, 2]}}), overrides))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1e-5", -1e-5),
        ("-3", -3),
        ("true", True),
        ("null", None),
        ("word", "word"),
        ("'7'", "7"),
        ("[3, 4.5]", [3, 4.5]),
        ("{x: 1}", {"x": 1}),
        ("k=v", "k=v"),
    ],
)
def test_values_are_yaml(text, value):
    for overrides in (["--new.b", text], [f"--new.b={text}"]):
        found = applied(overrides)["new"]["b"]
        assert found == value
        assert type(found) is type(value)


def test_mappings_merge_and_lists_are_replaced():
    assert applied(["--a", "{d: 4}"]) == {"a": {"b": 1, "c": [1, 2], "d": 4}}
    assert applied(["--a.c", "[9]"]) == {"a": {"b": 1, "c": [9]}}


def test_a_mapping_of_values_is_taken_as_it_is():
    assert applied({"a.b": "1e-5", "a.d": {"e": 2}}) == {"a": {"b": "1e-5", "c": [1, 2], "d": {"e": 2}}}


def test_later_overrides_win_and_the_tree_is_left_alone():
    tree = OmegaConf.create({"a": 1})
    assert apply_overrides(tree, ["--a=2", "--a=3"]).a == 3
    assert tree.a == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "'stray' is neither"),
        (["--a.b"], "--a.b has no value"),
        (["--a.b", "--a.c", "1"], "--a.b has no value"),
        (["--a.b", "[1,"], "no valid YAML"),
        (["--a..b", "1"], "--a..b is no dotted key"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        applied(words)
