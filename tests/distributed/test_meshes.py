"""What a checkpoint's storage does with replicated and sharded tensors on meshes of four processes."""

import json
import os
import subprocess
import sys

import mesh_jobs
import pytest
import torch
from mesh_jobs import MESHES
from safetensors.torch import load_file
from tiny_runs import assert_same_tensors

from fv_distill.export.checkpoint_weights import load_checkpoint_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    words = ("torch.distributed.run", "--standalone", "--nproc_per_node", "4", mesh_jobs.__file__, str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False, env=environment)
    # The processes compare what each layout loads of what each layout saved.
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("mesh", MESHES)
def test_one_process_puts_them_together(folder, mesh):
    (folder / mesh / "metadata.json").write_text(json.dumps({"format": 2}))
    expected = torch.load(folder / f"{mesh}.pt", weights_only=True)
    assert list(expected) == ["net", "net.optimizer"]
    for group, tensors in expected.items():
        loaded = load_checkpoint_tensors(folder / mesh, group)
        assert_same_tensors(loaded, tensors)
        assert {name: value.dtype for name, value in loaded.items()} == {n: v.dtype for n, v in tensors.items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_is_written_twice(folder, mesh):
    expected = torch.load(folder / f"{mesh}.pt", weights_only=True)
    for group, tensors in expected.items():
        written = [load_file(path) for path in (folder / mesh).glob(f"{group}-0*.safetensors")]
        assert len(written) > 1, "the processes share the writing"
        assert sum(t.numel() for file in written for t in file.values()) == sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_is_noticed(folder, tmp_path, damage):
    import shutil

    copy = shutil.copytree(folder / "shards", tmp_path / "copy")
    (copy / "metadata.json").write_text(json.dumps({"format": 2}))
    file = copy / "net-00001.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"net-00001\.safetensors: can't read .* the checkpoint is damaged"):
        load_checkpoint_tensors(copy, "net")
