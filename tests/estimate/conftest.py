from pathlib import Path

import pytest
from wide_model import make_wide_directory, make_wide_rows


@pytest.fixture(scope="session")
def wide_wan(tmp_path_factory) -> Path:
    """Eight blocks, 192 wide."""
    return make_wide_directory(tmp_path_factory.mktemp("wide") / "wan", num_layers=8)


@pytest.fixture(scope="session")
def wide_rows(tmp_path_factory) -> Path:
    """Rows with clips for it."""
    return make_wide_rows(tmp_path_factory.mktemp("wide") / "rows")
