"""What this machine can run, and what is wrong with it: the checks of `fv-distill doctor`."""

import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from .callbacks.video_files import best_suffix, write_video
from .console import console
from .doctor_check import Check
from .doctor_network import communication_checks, hub_check
from .training.launch_config import accelerate_config_checks

SELF_TEST_SECONDS = 120
# A checkpoint of DMD2 on 1.3 billion parameters: student, critic and average, two Adam states each of the first two.
WANTED_DISK_GB = 50
# What PyTorch's loader processes pass tensors through; containers often have 64 MB.
WANTED_SHARED_MEMORY_GB = 1
WRITTEN_MB = 64
WANTED_MB_PER_S = 100
ALLOWED_SKEW_SECONDS = 60
WANTED_OPEN_FILES = 4096
OPTIONAL_PACKAGES = {
    "av": "mp4 files",
    "wandb": "its tracker",
    "torchao": "quantised networks",
    "bitsandbytes": "8-bit optimizers",
}
OPTIONAL_ATTENTION = {"flash-attn": "flash_attn", "sageattention": "sageattention", "xformers": "xformers"}
_SELF_TEST = "fv_distill.doctor_self_test"
_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def run_doctor(output_dir: Path, *, accelerate_config: Path | None = None, as_json: bool = False) -> bool:
    """Print all checks as they are made, or as one JSON object; whether none is an error.

    Args:
        output_dir: where runs are going to be written; its disk is looked at.
        accelerate_config: a config of `accelerate launch`; None takes the default one, if there is one.
        as_json: for programs.
    """
    found = []
    for check in checks(output_dir, accelerate_config):
        found.append(check)
        if not as_json:
            _print(check)
    is_well = all(check.status != "error" for check in found)
    if as_json:
        print(json.dumps({"well": is_well, "checks": [asdict(check) for check in found]}))
    return is_well


def _print(check: Check) -> None:
    fix = f"\n         -> {check.fix}" if check.fix else ""
    console.print(f"{check.status:<8}", style=_STYLES[check.status], end=" ", highlight=False)
    console.print(f"{check.name}: {check.detail}{fix}", markup=False, highlight=False, soft_wrap=True)


def checks(output_dir: Path, accelerate_config: Path | None = None) -> Iterator[Check]:
    """All findings, quick ones first."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield from package_checks()
    yield optional_check()
    yield from device_checks()
    yield attention_check()
    yield video_check()
    yield disk_check("output directory", output_dir)
    yield from writing_checks(output_dir)
    yield disk_check("model cache", Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser())
    yield hub_check()
    yield shared_memory_check(Path("/dev/shm"))
    yield open_files_check()
    yield from accelerate_config_checks(accelerate_config)
    yield from communication_checks()
    yield from distributed_checks()


def package_checks() -> Iterator[Check]:
    """The installed packages against the ranges that this library was tested with; of the extras only what is there."""
    tested = []
    for text in requires("fv_distill") or []:
        requirement = Requirement(text)
        is_optional = requirement.marker is not None
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if not is_optional:
                yield Check(requirement.name, "error", "not installed", f'pip install "{_without_marker(requirement)}"')
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield Check(
                requirement.name,
                "warning",
                f"{installed}, tested with {requirement.specifier}",
                f'pip install "{_without_marker(requirement)}"',
            )
        elif not is_optional:
            tested.append(f"{requirement.name} {installed}")
    yield Check("packages", "ok", ", ".join(tested))


def optional_check() -> Check:
    """What is there of the packages that only some options need."""
    there, missing = [], []
    for name, use in OPTIONAL_PACKAGES.items():
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(f"{name} ({use})")
    return Check("optional packages", "ok", f"{', '.join(there) or 'none'}; not installed: {', '.join(missing) or '-'}")


def _without_marker(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def device_checks() -> Iterator[Check]:
    """Every accelerator with its memory, or that there is none."""
    if not torch.accelerator.is_available():
        yield Check(
            "accelerator",
            "warning",
            f"none; torch {torch.__version__} runs on {os.cpu_count()} CPU cores",
            "fine for the digits; for real models install a torch build for your accelerator and check its driver",
        )
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]
        detail = str(device)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                yield Check(f"accelerator {index}", "warning", f"{detail}, no bf16", "use mixed_precision: no")
                continue
        yield Check(f"accelerator {index}", "ok", detail)


def attention_check() -> Check:
    """Whether attention runs here, and which optional kernels are installed."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        query = torch.randn(1, 2, 16, 8, device=device)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        return Check("attention", "error", f"scaled_dot_product_attention fails: {error}", "reinstall torch")
    found = [name for name, module in OPTIONAL_ATTENTION.items() if importlib.util.find_spec(module)]
    return Check("attention", "ok", f"native{''.join(f', {name}' for name in found)} (models.<role>.attention_backend)")


def disk_check(name: str, directory: Path) -> Check:
    """Free space, and whether it can be written to, where `directory` is or is going to be."""
    there = _existing_parent(directory)
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Check(name, "error", f"{directory} can't be written to", "choose another directory or mend its rights")
    free = shutil.disk_usage(there).free / 1e9
    detail = f"{directory}, {free:.0f} GB free"
    if free < WANTED_DISK_GB:
        return Check(name, "warning", detail, f"a run on a 1.3 B model with checkpoints takes {WANTED_DISK_GB} GB")
    return Check(name, "ok", detail)


def _existing_parent(directory: Path) -> Path:
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


def writing_checks(directory: Path) -> Iterator[Check]:
    """How fast a checkpoint would be written there, and whether that file system's clock is this machine's."""
    try:
        with tempfile.TemporaryFile(dir=_existing_parent(directory)) as file:
            # Random, as some file systems compress.
            block = os.urandom(8 * 10**6)
            start = time.perf_counter()
            for _ in range(WRITTEN_MB // 8):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN_MB / (time.perf_counter() - start)
            skew = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as error:
        yield Check("writing", "error", f"{directory}: {error}", "choose another directory or mend its rights")
        return
    detail = f"{speed:.0f} MB/s to {directory}"
    if speed < WANTED_MB_PER_S:
        fix = f"each {WANTED_DISK_GB} GB of checkpoints take {WANTED_DISK_GB * 1000 / speed / 60:.0f} minutes"
        yield Check("writing", "warning", detail, fix)
    else:
        yield Check("writing", "ok", detail)
    if abs(skew) > ALLOWED_SKEW_SECONDS:
        detail = f"the file system of {directory} is {skew:+.0f} s off this machine's clock"
        yield Check("clock", "warning", detail, "synchronise the machines (chrony, ntp)")


def open_files_check() -> Check:
    """How many files and sockets a process may hold open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED_OPEN_FILES:
        fix = f"ulimit -n {WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(WANTED_OPEN_FILES, hard)}"
        return Check("open files", "warning", f"at most {soft}; loader processes and many ranks need more", fix)
    return Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def video_check() -> Check:
    """Whether validation could write its clips."""
    suffix = best_suffix()
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_video(Path(folder) / f"clip{suffix}", np.zeros((2, 64, 64, 3), np.uint8), fps=8)
    except (OSError, ValueError) as error:
        return Check("video", "error", f"{suffix} can't be written: {error}", "pip install --force-reinstall av")
    gif = "" if suffix == ".mp4" else "; mp4 needs pip install 'fv_distill[video]'"
    return Check("video", "ok", f"validation writes {suffix}{gif}")


def shared_memory_check(directory: Path) -> Check:
    """Room for the loader's processes."""
    if not directory.is_dir():
        return Check("shared memory", "ok", f"no {directory} on this system")
    size = shutil.disk_usage(directory).total / 1e9
    detail = f"{directory}, {size:.1f} GB"
    if size < WANTED_SHARED_MEMORY_GB:
        fix = "start the container with --shm-size=8g, or keep training.data.num_workers at 0"
        return Check("shared memory", "warning", detail, fix)
    return Check("shared memory", "ok", detail)


def distributed_checks() -> Iterator[Check]:
    """Two processes that add numbers and train a sharded layer: gloo on the CPU, nccl where there are two GPUs."""
    yield _self_test("gloo")
    if torch.cuda.device_count() >= 2:
        yield _self_test("nccl")


def _self_test(backend: str) -> Check:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    name = f"two processes, {backend}"
    try:
        done = subprocess.run(
            [*launcher, "-m", _SELF_TEST, backend],
            capture_output=True,
            text=True,
            check=False,
            timeout=SELF_TEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        busy = f"; or this machine is too busy: a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
        fix = f"look for a firewall or a wrong network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME){busy}"
        return Check(name, "error", f"no answer in {SELF_TEST_SECONDS} s", fix)
    if done.returncode:
        found = re.search(r"^(?:\[rank\d+\]: *)?(\w*Error: .*|terminate called .*)", done.stderr, re.MULTILINE)
        detail = found[1] if found else f"status {done.returncode}"
        return Check(name, "error", detail, f"torchrun --nproc_per_node 2 -m {_SELF_TEST} {backend} shows all of it")
    return Check(name, "ok", "a sum over both, and a step of an FSDP2-sharded layer equal to the whole one's")
