"""A process that has joined a group gives gloo's threads time to end."""

import subprocess
import sys

import pytest

_SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch.distributed as dist
from fv_distill.gloo import await_gloo_at_exit

directory, joins = Path(sys.argv[1]), sys.argv[2] == "joins"
if joins:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
await_gloo_at_exit()
await_gloo_at_exit()
if joins:
    dist.destroy_process_group()

def late():
    time.sleep(0.1)
    (directory / "late").touch()

# As gloo's threads do, this one needs the interpreter after the main one's last line.
threading.Thread(target=late, daemon=True).start()
"""


@pytest.mark.parametrize("joins", [True, False])
def test_only_a_process_of_a_group_waits_for_late_threads(tmp_path, joins):
    subprocess.run([sys.executable, "-c", _SCRIPT, str(tmp_path), "joins" if joins else "alone"], check=True)
    assert (tmp_path / "late").exists() == joins
