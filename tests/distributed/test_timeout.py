"""A process doesn't wait for the others for ever: `training.distributed.timeout_minutes`."""

import multiprocessing
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fv_distill.config import ConfigError, load_run_config
from fv_distill.training import make_accelerator


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for_the_other(rank: int, port: int, folder: str, minutes: float, answers) -> None:
    """Rank 1 never takes part in the sum."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    accelerator = make_accelerator(output_dir=folder, timeout_minutes=minutes)
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    if rank == 1:
        answers.put(options._timeout)
        answers.get()
    try:
        accelerator.gather(torch.ones(1))
    except RuntimeError as error:
        answers.put(str(error))


def run_two(tmp_path, minutes):
    context = multiprocessing.get_context("fork")
    queues = context.Queue(), context.Queue()
    port = free_port()
    processes = [
        context.Process(target=wait_for_the_other, args=(rank, port, str(tmp_path), minutes, queues[rank]))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    return processes, queues


@pytest.mark.parametrize("minutes", [0.02, 10])
def test_the_wait_ends(tmp_path, minutes):
    """Ten minutes are accelerate's own default, which it doesn't hand on though gloo's is thirty."""
    processes, queues = run_two(tmp_path, minutes)
    try:
        given = queues[1].get(timeout=120)
        assert abs(given - timedelta(minutes=minutes)) < timedelta(milliseconds=1)
        if minutes < 1:
            assert "Timed out waiting 1200ms" in queues[0].get(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_no_time_is_refused(tiny_wan, tiny_rows, tmp_path):
    from tiny_runs import finetune_config, write_config

    path = write_config(
        finetune_config(tiny_wan, tiny_rows, tmp_path / "run"),
        tmp_path / "run.yaml",
        {"training.distributed.timeout_minutes": 0},
    )
    with pytest.raises(ConfigError, match=r"training\.distributed\.timeout_minutes"):
        load_run_config(path)


def test_restarts_over_a_shared_store_are_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    make_accelerator(output_dir=tmp_path)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    make_accelerator(output_dir=tmp_path)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in "".join(capsys.readouterr().out.split())
