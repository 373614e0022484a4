"""`parallel_runs.py` for networks of diffusers that need torchvision, where that is missing."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import parallel_runs
import tiny_cosmos  # noqa: F401

if __name__ == "__main__":
    parallel_runs.main(sys.argv[1], sys.argv[2])
