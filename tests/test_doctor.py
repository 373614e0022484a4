"""The doctor finds what is wrong, says how to mend it, and is content with this machine."""

import subprocess
import sys
from collections import namedtuple

import pytest

from fv_distill import doctor

Usage = namedtuple("Usage", "total used free")


def test_this_machine_is_well(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fv_distill", "doctor", "--output-dir", str(tmp_path / "outputs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "two processes, gloo: a sum over both" in done.stdout
    for name in ("python", "torch", "accelerate", "accelerator", "attention", "output directory", "shared memory"):
        assert f" {name}" in done.stdout or done.stdout.startswith(name), name
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
        "numpy": "ok",
        "pytest": "warning",
    }
    assert "tested with >=99" in found["torch"].detail
    assert found["nosuchpackage"].fix == 'pip install "nosuchpackage>=1"'


def test_an_error_is_status_1(monkeypatch, tmp_path, capsys):
    broken = doctor.Check("disk", "error", "full [of] things", "make room")
    monkeypatch.setattr(doctor, "checks", lambda _: iter([doctor.Check("python", "ok", "3"), broken]))
    assert not doctor.run_doctor(tmp_path)
    printed = capsys.readouterr().out
    assert "full [of] things" in printed and "-> make room" in printed
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
