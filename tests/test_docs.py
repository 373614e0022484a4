"""The documentation's option tables, paths, names, links, snippets and YAML are those of the code."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fv_distill.rng import SampleRng

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "examples").rglob("README.md")]
)
INLINE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]


def test_option_tables_are_up_to_date():
    command = [sys.executable, str(DOCS / "make_option_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_in_the_navigation():
    named = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        # Pictures are made by the demo.
        assert not target or target.endswith(".png") or (page.parent / target).exists(), target
        if anchor and target.endswith(".md"):
            headings = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(), re.MULTILINE)
            assert anchor[1:] in [heading.lower().replace(" ", "-") for heading in headings], anchor
    code = [*INLINE.findall(text), *(body for _, body in BLOCK.findall(text))]
    for path in re.findall(r"(?:examples|configs|benchmarks|src|tests)/[\w./-]+", "\n".join(code)):
        assert (ROOT / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_dotted_names_exist(page):
    for name in re.findall(r"\bfv_distill(?:\.\w+)+", page.read_text()):
        if name == "fv_distill.json":
            continue
        try:
            importlib.import_module(name)
        except ImportError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_is_yaml(page):
    for body in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(body), dict)


def test_rows_of_the_data_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (body,) = blocks(DOCS / "data.md", "python")
    exec(body, {})
    assert capsys.readouterr().out == "4 torch.Size([16, 3, 8, 8])\n"


def test_scheduler_of_the_export_page(capsys):
    _, body = blocks(DOCS / "export.md", "python")
    exec(body, {})
    assert capsys.readouterr().out.strip() == body.splitlines()[-1].split("# ")[1]


def test_method_of_its_page(tiny_wan, batch):
    from tiny_models import TEXT_LENGTH

    from fv_distill.models import WanModel

    namespace: dict = {}
    exec(blocks(DOCS / "add_a_method.md", "python")[0], namespace)
    models = {
        role: WanModel.from_pretrained(str(tiny_wan), trainable=role == "student", text_length=TEXT_LENGTH)
        for role in ("student", "teacher")
    }
    method = namespace["GuidanceMethod"](models)
    method.encode_prompts()
    (term,) = method.losses("student", batch, SampleRng(0, 1, batch["sample_index"]))
    term.loss.backward()
    assert term.loss > 0
    assert all(parameter.grad is not None for parameter in models["student"].transformer.parameters())


def test_names_of_the_original_wan_page(capsys):
    (body,) = blocks(DOCS / "convert_wan.md", "python")
    exec(body, {})
    assert capsys.readouterr().out.strip() == body.split("# ")[1].splitlines()[0]


def test_callback_of_its_page(tiny_wan, tiny_rows, tmp_path):
    """As the page says: in a file beside the config, by its `_target_` there."""
    from tiny_runs import checkpoint, finetune_config, metrics, train

    from fv_distill.export import load_role_weights

    (body,) = blocks(DOCS / "callbacks.md", "python")
    (tmp_path / "my_callbacks.py").write_text(body)
    (page,) = (yaml.safe_load(text) for text in blocks(DOCS / "callbacks.md", "yaml"))
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["callbacks"] = {"mine": page["callbacks"]["mine"] | {"every_steps": 3}}
    lines = metrics(output_dir := train(config))
    assert ["weight_norm/student" in line for line in lines] == [False, False, True, False]
    weights = load_role_weights(checkpoint(output_dir, 2), "student").values()
    assert lines[2]["weight_norm/student"] == pytest.approx(sum(w.double().square().sum() for w in weights) ** 0.5)
