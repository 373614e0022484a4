"""The table of docs/estimate.md: what Wan takes on 1, 8 and 64 H100s, by `fv-distill estimate`'s own numbers.

python docs/make_estimate_tables.py          # writes the page
python docs/make_estimate_tables.py --check  # status 1 if it is out of date
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fv_distill.config import load_run_config
from fv_distill.estimate import read_layout
from fv_distill.estimate.advice import fits
from fv_distill.estimate.estimate import Device, Estimate
from fv_distill.estimate.report import flops_for_people
from fv_distill.hardware import peak_flops
from fv_distill.training.estimating import estimate_run

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/estimate.md"
MARKERS = re.compile(r"(<!-- estimates -->\n).*?(<!-- end of estimates -->)", re.DOTALL)
HEADER = """
| method | network | GPUs | micro-batches | peak, GiB | in | fits 80 GiB | PFLOP per step and GPU | s per step |
|---|---|---|---|---|---|---|---|---|
"""

GLOBAL_BATCH = 64
LAUNCHES = {1: "gpu_1", 8: "fsdp2_8gpu", 64: "fsdp2_8gpu"}
SMALL, LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
METHODS = {"DMD2": "dmd2", "Self-Forcing": "self_forcing"}
NETWORKS = {"1.3B": SMALL, "14B": LARGE}


def estimate(method: str, network: str, num_gpus: int) -> Estimate:
    """One run with three networks of one size and a global batch of `GLOBAL_BATCH`."""
    overrides = {f"models.{role}.init_from": NETWORKS[network] for role in ("student", "teacher", "critic")}
    overrides["training.loop.gradient_accumulation_steps"] = GLOBAL_BATCH // num_gpus
    config = load_run_config(ROOT / f"examples/configs/{METHODS[method]}/wan2.1_1.3b.yaml", overrides)
    layout = read_layout(ROOT / f"configs/accelerate/{LAUNCHES[num_gpus]}.yaml", num_gpus)
    return estimate_run(config, layout, Device("H100", peak_flops("H100", "bfloat16"), 80 * 2**30, 0.4))


def row(method: str, network: str, num_gpus: int) -> str:
    """One line of the table."""
    found = estimate(method, network, num_gpus)
    peak, seconds = found.peak, found.seconds_per_step
    assert seconds is not None, "the H100's rate is known"
    flops = flops_for_people(found.flops_per_step).removesuffix(" PFLOP")
    cells = (
        *(method, network, num_gpus, found.clip.accumulation_steps),
        *(f"{peak.total / 2**30:.0f}", peak.name, "yes" if fits(found) else "**no**", flops, f"{seconds:.0f}"),
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def rows() -> Iterator[str]:
    """All lines."""
    for method in METHODS:
        for network in NETWORKS:
            for num_gpus in LAUNCHES:
                yield row(method, network, num_gpus)


def main() -> None:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    table = HEADER + "".join(rows()) + "\n"
    after = MARKERS.sub(lambda match: match[1] + table + match[2], before)
    if check and after != before:
        sys.exit("docs/estimate.md is out of date; run python docs/make_estimate_tables.py")
    if not check:
        PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
