"""The doctor finds what is wrong, says how to mend it, and is content with this machine."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from fv_distill import doctor, doctor_network
from fv_distill.training import launch_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
Usage = namedtuple("Usage", "total used free")


def test_this_machine_is_well(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fv_distill", "doctor", "--json", "--output-dir", str(tmp_path / "outputs")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["well"] is True
    found = {check["name"]: check for check in told["checks"]}
    assert "a sum over both" in found["two processes, gloo"]["detail"]
    assert "torch " in found["packages"]["detail"] and "accelerate " in found["packages"]["detail"]
    assert " MB/s to " in found["writing"]["detail"] and "wandb" in found["optional packages"]["detail"]
    assert found["accelerate config"]["detail"].startswith(f"none at {tmp_path}/accelerate")
    names = ["python", "accelerator", "attention", "video", "hub", "communication"]
    assert {*names, "output directory", "model cache", "shared memory", "open files"} <= found.keys()
    assert not (tmp_path / "outputs").exists()


def test_packages_are_compared_with_the_tested_ranges(monkeypatch):
    wanted = [
        "torch>=99",
        "nosuchpackage>=1",
        'nosuchextra>=1; extra == "dev"',
        "numpy>=1",
        'pytest>=99; extra == "dev"',
    ]
    monkeypatch.setattr(doctor, "requires", lambda _: wanted)
    found = {check.name: check for check in doctor.package_checks()}
    assert {name: check.status for name, check in found.items()} == {
        "torch": "warning",
        "nosuchpackage": "error",
        "packages": "ok",
        "pytest": "warning",
    }
    assert found["packages"].detail.startswith("numpy ") and "," not in found["packages"].detail
    assert "tested with >=99" in found["torch"].detail
    assert found["nosuchpackage"].fix == 'pip install "nosuchpackage>=1"'


def test_an_error_is_status_1(monkeypatch, tmp_path, capsys):
    broken = doctor.Check("disk", "error", "full [of] things", "make room")
    monkeypatch.setattr(doctor, "checks", lambda *_: iter([doctor.Check("python", "ok", "3"), broken]))
    assert not doctor.run_doctor(tmp_path)
    printed = capsys.readouterr().out
    assert "full [of] things" in printed and "-> make room" in printed
    assert not doctor.run_doctor(tmp_path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["well"] is False and told["checks"][1]["fix"] == "make room"
    from fv_distill.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 1


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    assert doctor.disk_check("output directory", tmp_path / "file" / "runs").status == "error"


def test_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(total=64e6, used=0, free=2e9))
    check = doctor.disk_check("output directory", tmp_path / "new" / "runs")
    assert check.status == "warning" and "2 GB free" in check.detail
    check = doctor.shared_memory_check(tmp_path)
    assert check.status == "warning" and "--shm-size" in check.fix


def test_processes_that_do_not_start_or_answer(monkeypatch):
    check = doctor._self_test("nosuchbackend")
    assert check.status == "error" and "nosuchbackend" in check.detail.lower()
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.2)
    check = doctor._self_test("gloo")
    assert check.status == "error" and "no answer in 0.2 s" in check.detail and "GLOO_SOCKET_IFNAME" in check.fix


def test_slow_storage_and_another_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "WRITTEN_MB", 8)
    monkeypatch.setattr(doctor, "WANTED_MB_PER_S", 1e9)
    now = doctor.time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now + 3600)
    writing, clock = doctor.writing_checks(tmp_path / "new" / "runs")
    assert writing.status == "warning" and "each 50 GB of checkpoints take" in writing.fix
    assert clock.status == "warning" and "-3600 s" in clock.detail.replace("-3599", "-3600")
    assert list(tmp_path.iterdir()) == []


def test_few_open_files(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 2048))
    check = doctor.open_files_check()
    assert check.status == "warning" and check.fix == "ulimit -n 2048"


def test_a_video_that_cannot_be_written(monkeypatch):
    def fail(*_, **__):
        raise OSError("no encoder")

    assert doctor.video_check().status == "ok"
    monkeypatch.setattr(doctor, "write_video", fail)
    assert doctor.video_check().status == "error" and "no encoder" in doctor.video_check().detail


def accelerate_config(tmp_path, **changes):
    config = yaml.safe_load((ROOT / "configs/accelerate/fsdp2_8gpu.yaml").read_text())
    for key, value in changes.items():
        section = config["fsdp_config"] if key.startswith("fsdp_") else config
        section[key] = value
        if value is None:
            del section[key]
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return list(doctor.accelerate_config_checks(tmp_path / "accelerate.yaml"))


@pytest.mark.parametrize(
    "changes, detail, fix",
    [
        ({"mixed_precision": "fp16"}, "mixed_precision: fp16 is refused", "bf16"),
        ({"fsdp_version": 1}, "fsdp_version: 1 is refused", "fsdp_version: 2"),
        ({"fsdp_version": None}, "fsdp_version: missing, which is 1, is refused", "fsdp_version: 2"),
        ({"fsdp_cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading is on", "false"),
        ({"fsdp_cpu_ram_efficient_loading": None}, "fsdp_cpu_ram_efficient_loading is on", "false"),
        ({"fsdp_activation_checkpointing": "true"}, "gave wrong gradients", "training.model.gradient_checkpointing"),
        ({"distributed_type": "DEEPSPEED"}, "DEEPSPEED is not supported", "FSDP"),
        ({"num_machines": 3}, "num_processes: 8 do not divide by num_machines: 3", "all machines"),
        (
            {"parallelism_config": {"parallelism_config_dp_shard_size": 4}},
            "parallelism_config's sizes multiply to 4, num_processes is 8",
            "product",
        ),
    ],
)
def test_what_is_refused_in_an_accelerate_config(tmp_path, monkeypatch, changes, detail, fix):
    monkeypatch.setattr(launch_config.torch.accelerator, "device_count", lambda: 8)
    (check,) = accelerate_config(tmp_path, **changes)
    assert check.status == "error" and detail in check.detail and fix in check.fix


def test_an_accelerate_config_for_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_config.torch.accelerator, "device_count", lambda: 4)
    (check,) = accelerate_config(tmp_path)
    assert check.status == "error" and "8 processes a machine, and this one has 4" in check.detail
    (check,) = accelerate_config(tmp_path, num_processes=4, fsdp_auto_wrap_policy="NO_WRAP")
    assert check.status == "warning" and "NO_WRAP" in check.detail


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_accelerate_configs_are_well(path, monkeypatch):
    monkeypatch.setattr(launch_config.torch.accelerator, "device_count", lambda: 8)
    assert [check.status for check in doctor.accelerate_config_checks(path)] == ["ok"]


def test_an_accelerate_config_that_cannot_be_read(tmp_path):
    (check,) = doctor.accelerate_config_checks(tmp_path / "none.yaml")
    assert check.status == "error" and "none.yaml can't be read" in check.detail
    (tmp_path / "some.yaml").write_text("num_procs: 2\n")
    (check,) = doctor.accelerate_config_checks(tmp_path / "some.yaml")
    assert check.status == "error"
    (tmp_path / "none.yaml").write_text("a: [")
    (check,) = doctor.accelerate_config_checks(tmp_path / "none.yaml")
    assert check.status == "error"


def test_variables_that_steer_the_network(monkeypatch):
    monkeypatch.setattr(doctor_network.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "=ib0")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    first, *others = doctor.communication_checks()
    assert first.status == "ok" and "NCCL_SOCKET_IFNAME=eth" in first.detail
    assert [check.status for check in others[:2]] == ["error", "warning"]
    assert "GLOO_SOCKET_IFNAME=ib0" in others[0].detail.replace("==", "=") and "eth0" in others[0].fix
    monkeypatch.setattr(doctor_network.socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("unknown")))
    assert "has no address" in list(doctor.communication_checks())[-1].detail


def test_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline (HF_HUB_OFFLINE" in doctor.hub_check().detail
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert "downloaded" in doctor.hub_check().detail
