"""What this machine can run, and what is wrong with it: the checks of `fv-distill doctor`."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from .console import console

SELF_TEST_SECONDS = 120
# A checkpoint of DMD2 on 1.3 billion parameters: student, critic and average, two Adam states each of the first two.
WANTED_DISK_GB = 50
# What PyTorch's loader processes pass tensors through; containers often have 64 MB.
WANTED_SHARED_MEMORY_GB = 1
OPTIONAL_ATTENTION = {"flash-attn": "flash_attn", "sageattention": "sageattention", "xformers": "xformers"}
_SELF_TEST = "fv_distill.doctor_self_test"
_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it is, and for what isn't well what to do."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    fix: str = ""


def run_doctor(output_dir: Path) -> bool:
    """Print all checks as they are made; whether none is an error.

    Args:
        output_dir: where runs are going to be written; its disk is looked at.
    """
    is_well = True
    for check in checks(output_dir):
        is_well = is_well and check.status != "error"
        fix = f"\n         -> {check.fix}" if check.fix else ""
        console.print(f"{check.status:<8}", style=_STYLES[check.status], end=" ", highlight=False)
        console.print(f"{check.name}: {check.detail}{fix}", markup=False, highlight=False, soft_wrap=True)
    return is_well


def checks(output_dir: Path) -> Iterator[Check]:
    """All findings, quick ones first."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield from package_checks()
    yield from device_checks()
    yield attention_check()
    yield disk_check("output directory", output_dir)
    yield disk_check("model cache", Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser())
    yield shared_memory_check(Path("/dev/shm"))
    yield from distributed_checks()


def package_checks() -> Iterator[Check]:
    """The installed packages against the ranges that this library was tested with; of the extras only what is there."""
    for text in requires("fv_distill") or []:
        requirement = Requirement(text)
        is_optional = requirement.marker is not None
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if not is_optional:
                yield Check(requirement.name, "error", "not installed", f'pip install "{_without_marker(requirement)}"')
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            # One line for each of the extras' tools would hide what matters.
            if not is_optional:
                yield Check(requirement.name, "ok", installed)
        else:
            yield Check(
                requirement.name,
                "warning",
                f"{installed}, tested with {requirement.specifier}",
                f'pip install "{_without_marker(requirement)}"',
            )


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
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Check(name, "error", f"{directory} can't be written to", "choose another directory or mend its rights")
    free = shutil.disk_usage(there).free / 1e9
    detail = f"{directory}, {free:.0f} GB free"
    if free < WANTED_DISK_GB:
        return Check(name, "warning", detail, f"a run on a 1.3 B model with checkpoints takes {WANTED_DISK_GB} GB")
    return Check(name, "ok", detail)


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
        fix = "look for a firewall or a wrong network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        return Check(name, "error", f"no answer in {SELF_TEST_SECONDS} s", fix)
    if done.returncode:
        found = re.search(r"^(?:\[rank\d+\]: *)?(\w*Error: .*)", done.stderr, re.MULTILINE)
        detail = found[1] if found else f"status {done.returncode}"
        return Check(name, "error", detail, f"torchrun --nproc_per_node 2 -m {_SELF_TEST} {backend} shows all of it")
    return Check(name, "ok", "a sum over both, and a step of an FSDP2-sharded layer equal to the whole one's")
