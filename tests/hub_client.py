"""Processes that use the small Hub, as a user's would: huggingface_hub reads its environment when it is imported."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hub_server import WRITE_TOKEN, HubServer

TESTS = Path(__file__).parent


def hub_environment(hub: HubServer, home: Path, *, token: str | None = WRITE_TOKEN) -> dict[str, str]:
    """An environment whose Hub is `hub`; `home` holds the login and the cache of nobody."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        # The storage protocol of hf_xet is compiled code that speaks to more than one server; LFS is the same to us.
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
        "COLUMNS": "1000",
    }
    return kept | own | ({} if token is None else {"HF_TOKEN": token})


def run_python(
    words: Sequence[object], environment: dict[str, str], *, status: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python, expect an exit status, and see that the token is nowhere in what it prints."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300, cwd=cwd)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    if "HF_TOKEN" in environment:
        assert environment["HF_TOKEN"] not in done.stdout + done.stderr
    return done


def assert_same_files(directory: Path, files: dict[str, bytes]) -> None:
    """That a repository's files are those of a directory, to the last byte."""
    local = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    assert sorted(local) == sorted(set(files) - {".gitattributes"})
    assert [name for name, data in local.items() if files[name] != data] == []
