"""Two processes, one of which talks to the Hub."""

from pathlib import Path

from hub_client import assert_same_files, hub_environment, run_python
from hub_server import HubServer
from tiny_runs import dmd2_config, write_config


def test_the_main_process_pushes_and_the_other_waits(tiny_wan, tiny_rows, tmp_path):
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    export = {"export_dir": str(tmp_path / "student"), "hub_model_id": "me/student"}
    config["pipeline"] = {"push_to_hub": True, "hub_strategy": "checkpoint", **export}
    script = Path(__file__).with_name("push_two_processes.py")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    with HubServer() as hub:
        words = (*launcher, script, write_config(config, tmp_path / "run.yaml"))
        run_python(words, hub_environment(hub, tmp_path / "home"))
        repository = hub.repositories["me/student"]
        # The push of the second step's may still be going on when the fourth's is there, which it never replaces.
        assert repository.commits[-2:] == ["step-00000004 of 4", "Checkpoint step-00000004"]
        assert len(hub.sent("POST /api/repos/create")) == 1 + len(repository.commits) // 2
        checkpoint = {name for name in repository.files if name.startswith("last-checkpoint/")}
        assert "last-checkpoint/metadata.json" in checkpoint
        exported = {name: data for name, data in repository.files.items() if name not in checkpoint}
        assert_same_files(tmp_path / "student", exported)
