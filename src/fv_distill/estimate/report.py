"""An estimate for people and for machines."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from fv_distill.console import console

from .advice import RESERVE, advice, fits, gib, usable_bytes
from .estimate import Estimate
from .flops import CountedCall

_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1.0, "FLOP"))


def print_estimate(estimate: Estimate) -> None:
    """Tables on parameters, memory and calls, and what they mean for the run."""
    clip, layout = estimate.clip, estimate.layout
    console.print(
        f"latents {list(clip.latents)}, text {list(clip.text)}, global batch {estimate.global_batch_size}; {layout}",
        highlight=False,
        markup=False,
    )
    for table in (_parameter_table(estimate), _memory_table(estimate), _call_table(estimate)):
        console.print(table)
    for line in (*_memory_lines(estimate), *_time_lines(estimate), *_disk_lines(estimate)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def as_json(estimate: Estimate) -> dict[str, Any]:
    """The estimate in plain values: bytes, FLOPs, seconds."""
    peak, usable = estimate.peak, usable_bytes(estimate)
    return {
        "layout": dataclasses.asdict(estimate.layout),
        "clip": {
            "batch_size": estimate.clip.batch_size,
            "accumulation_steps": estimate.clip.accumulation_steps,
            "latents": list(estimate.clip.latents),
            "text": list(estimate.clip.text),
        },
        "device": dataclasses.asdict(estimate.device),
        "global_batch_size": estimate.global_batch_size,
        "roles": {
            size.role: {
                "parameters": size.parameters,
                "trainable": size.trainable,
                "dtype": str(size.dtype).removeprefix("torch."),
                "rank_bytes": size.rank_bytes,
            }
            for size in estimate.roles
        },
        "memory": {
            "peak_bytes": peak.total,
            "peak_phase": peak.name,
            "usable_bytes": usable,
            "fits": fits(estimate),
            "phases": {phase.name: dict(phase.parts) for phase in estimate.phases},
            "activation_bytes": {role: dict(sizes) for role, sizes in estimate.activations.items()},
            "host_bytes_while_loading": estimate.host_bytes,
        },
        "calls": [_call_as_json(counted) for counted in estimate.calls],
        "flops_per_step": estimate.flops_per_step,
        "executed_flops_per_step": estimate.executed_flops_per_step,
        "seconds_per_step": estimate.seconds_per_step,
        "seconds": None if estimate.seconds_per_step is None else estimate.seconds_per_step * estimate.num_steps,
        "disk": {
            "checkpoint_bytes": estimate.checkpoint_bytes,
            "kept_checkpoints": estimate.num_checkpoints,
            "teacher_path_bytes": estimate.paths.path_bytes,
            "teacher_paths_per_row": estimate.paths.per_row,
        },
        "advice": advice(estimate),
    }


def _call_as_json(counted: CountedCall) -> dict[str, Any]:
    return {**dataclasses.asdict(counted.call), **dataclasses.asdict(counted.cost)}


def _parameter_table(estimate: Estimate) -> Table:
    table = _table("networks", ("role", "parameters", "kept in", "trained", "on each process"))
    for size in estimate.roles:
        table.add_row(
            size.role,
            f"{size.parameters / 1e6:,.2f} M",
            str(size.dtype).removeprefix("torch."),
            "yes" if size.trainable else "no",
            gib(size.rank_bytes),
        )
    return table


def _memory_table(estimate: Estimate) -> Table:
    """One column per phase."""
    table = _table("memory of each process, GiB", ("", *(phase.name for phase in estimate.phases)))
    for part in dict.fromkeys(part for phase in estimate.phases for part in phase.parts):
        table.add_row(part, *(_number(phase.parts.get(part)) for phase in estimate.phases))
    totals = [_number(phase.total) for phase in estimate.phases]
    table.add_row("in all", *totals, style="bold")
    return table


def _call_table(estimate: Estimate) -> Table:
    """Calls of a step and process, those of one kind put together."""
    table = _table("network calls of the average step", ("role", "kind", "calls", "arithmetic"))
    steps = estimate.clip.accumulation_steps
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for counted in estimate.calls:
        key = counted.call.role, kind_of(counted)
        count, flops = sums.get(key, (0.0, 0.0))
        number = counted.call.count * steps
        sums[key] = count + number, flops + number * counted.cost.flops
    for (role, kind), (count, flops) in sums.items():
        table.add_row(role, kind, f"{count:.4g}", flops_for_people(flops))
    return table


def kind_of(counted: CountedCall) -> str:
    """What people call such a call."""
    call = counted.call
    spans = {"clip": "whole clip", "clip_after_history": "clip behind its clean copy", "chunk": "one chunk, cached"}
    backward = "with backward" if call.grad else "unconditional pass of guidance" if call.guided else "no gradient"
    return f"{spans[call.span]}, {backward}"


def _memory_lines(estimate: Estimate) -> Iterator[str]:
    peak, usable = estimate.peak, usable_bytes(estimate)
    for role, sizes in estimate.activations.items():
        yield (
            f"activations of the {role} update: {gib(sizes['without'])} without gradient checkpointing, "
            f"{gib(sizes['with'])} with it ({'on' if estimate.checkpointing[role] else 'off'} here)"
        )
    yield f"host memory while networks are loaded: {gib(estimate.host_bytes)} for each process"
    if usable is None:
        yield f"peak {gib(peak.total)} in the {peak.name}"
        return
    assert estimate.device.memory_bytes is not None
    verdict = "fits" if fits(estimate) else "DOES NOT FIT"
    yield (
        f"peak {gib(peak.total)} in the {peak.name}: {verdict} {gib(estimate.device.memory_bytes)} "
        f"({RESERVE:.0%} of it are left to driver, NCCL and fragmentation)"
    )
    yield from (f"  -> {line}" for line in advice(estimate))


def _time_lines(estimate: Estimate) -> Iterator[str]:
    device, seconds = estimate.device, estimate.seconds_per_step
    yield (
        f"arithmetic: {flops_for_people(estimate.flops_per_step)} per step and process, "
        f"{flops_for_people(estimate.executed_flops_per_step)} with recomputation"
    )
    if seconds is None or device.peak_flops is None:
        yield f"time: the peak rate of {device.name!r} is not known; give --peak-tflops"
        return
    whole = duration(seconds * estimate.num_steps)
    yield (
        f"time: {seconds:.3g} s per step, {whole} for {estimate.num_steps:,} steps, at {device.mfu:.0%} of "
        f"{device.peak_flops / 1e12:g} TFLOP/s ({device.name})"
    )


def _disk_lines(estimate: Estimate) -> Iterator[str]:
    size, kept, paths = estimate.checkpoint_bytes, estimate.num_checkpoints, estimate.paths
    # The new one is complete before the oldest is removed.
    yield f"disk: {gib(size)} a checkpoint, {gib(size * (kept + 1))} for {kept} kept and one being written"
    if not paths.per_row:
        return
    rate = None if estimate.device.peak_flops is None else estimate.device.peak_flops * estimate.device.mfu
    time = "" if rate is None else f" and {duration(1000 * paths.per_row * paths.path_flops / rate)} of one process"
    yield (
        f"teacher paths: {paths.calls_per_path} calls and {gib(paths.path_bytes)} each, "
        f"{gib(1000 * paths.per_row * paths.path_bytes)}{time} for 1,000 rows of data"
    )


def flops_for_people(flops: float) -> str:
    """With a unit."""
    scale, unit = next((entry for entry in _UNITS if flops >= entry[0]), _UNITS[-1])
    return f"{flops / scale:.3g} {unit}"


def duration(seconds: float) -> str:
    """In the unit that makes it readable."""
    for scale, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _number(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"
