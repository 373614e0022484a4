"""The table of docs/estimate.md is the code's: some of its rows are made anew, `--check` makes them all."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_estimate_tables", DOCS / "make_estimate_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("run", [("DMD2", "1.3B", 1), ("Self-Forcing", "14B", 64)], ids=str)
def test_rows_are_up_to_date(script, run):
    assert script.row(*run) in (DOCS / "estimate.md").read_text()


def test_no_row_is_missing(script):
    table = (DOCS / "estimate.md").read_text().split("<!-- estimates -->")[1].split("<!-- end of estimates -->")[0]
    assert table.count("\n| ") == 1 + len(script.METHODS) * len(script.NETWORKS) * len(script.LAUNCHES)
