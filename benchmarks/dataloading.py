"""How fast the data loader delivers batches, against reading the same bytes from the same files.

Writes a temporary data set of Wan-like rows, reads it both ways in turn (the files are in the page cache, so this
measures the loader and not the disk) and prints one JSON line. The target is a ratio of at least 0.5.

    python benchmarks/dataloading.py --total-mb 1000
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars

from fv_distill.data.loader import BatchPlan, build_loader
from fv_distill.data.parquet import ParquetDataset
from fv_distill.data.schema import TORCH_DTYPES, write_rows

LATENT_SHAPE = (16, 21, 60, 104)
"""81 frames at 480 x 832 in Wan 2.1's VAE."""

TEXT_WIDTH = 4096
NUM_FILES = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-mb", type=int, default=800, help="size of the data set")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="as stored")
    parser.add_argument("--text-tokens", type=int, default=128, help="tokens of each stored text")
    parser.add_argument("--text-length", type=int, default=512, help="tokens that texts are padded to")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where the temporary data set is made")
    return parser.parse_args()


def write_data_set(folder: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Rows of noise, which zstd can't shrink. Returns the number of rows and the bytes of their tensors."""
    dtype = TORCH_DTYPES[args.dtype]
    latent = torch.randn(LATENT_SHAPE).to(dtype)
    text = torch.randn(args.text_tokens, TEXT_WIDTH).to(dtype)
    row_bytes = latent.nbytes + text.nbytes
    per_file = max(1, args.total_mb * 10**6 // row_bytes // NUM_FILES)
    for file in range(NUM_FILES):
        rows = (
            {"vae_latent": latent.roll(row), "text_embedding": text.roll(row), "caption": f"clip {file} {row}"}
            for row in range(per_file)
        )
        write_rows(folder / f"part-{file}.parquet", rows)
    return per_file * NUM_FILES, per_file * NUM_FILES * row_bytes


def read_raw(files: list[Path], block: int) -> int:
    """Read the files in blocks of a row's size, each into bytes of its own, as the loader delivers rows."""
    total = 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while data := opened.read(block):
                total += len(data)
    return total


def read_into_one_buffer(files: list[Path], block: int) -> int:
    """Read the files over and over into the same memory, delivering nothing: the upper bound of the page cache."""
    buffer = memoryview(bytearray(block))
    total = 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total


def read_batches(dataset: ParquetDataset, args: argparse.Namespace) -> int:
    """One epoch, shuffled. Returns the number of rows."""
    plan = BatchPlan(
        seed=0, num_rows=len(dataset), micro_batch_size=args.batch_size, accumulation_steps=1, world_size=1, rank=0
    )
    num_steps = len(dataset) // args.batch_size
    loader = build_loader(
        dataset,
        plan,
        start_step=0,
        num_steps=num_steps,
        text_length=args.text_length,
        caption_dropout=0.1,
        seed=0,
        num_workers=args.num_workers,
    )
    return sum(len(batch["caption"]) for micro_batches in loader for batch in micro_batches)


def main() -> None:
    args = parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        num_rows, num_bytes = write_data_set(folder / "rows", args)
        files = sorted((folder / "rows").glob("*.parquet"))
        start = time.perf_counter()
        dataset = ParquetDataset(folder / "rows", cache_dir=folder / "cache")
        prepare_seconds = time.perf_counter() - start
        row_bytes = num_bytes // num_rows
        readers = {
            "loader": lambda: read_batches(dataset, args) * row_bytes,
            "raw": lambda: read_raw(files, row_bytes),
            "one_buffer": lambda: read_into_one_buffer(files, row_bytes),
        }
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for repeat in range(args.repeats + 1):
            for name, read in readers.items():
                start = time.perf_counter()
                total = read()
                if repeat:  # the first round warms the page cache
                    speeds[name].append(total / (time.perf_counter() - start) / 1e6)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = [loader / raw for loader, raw in zip(speeds["loader"], speeds["raw"], strict=True)]
    result = {
        "benchmark": "dataloading",
        "mb_per_s": round(median["loader"], 1),
        "raw_mb_per_s": round(median["raw"], 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "one_buffer_mb_per_s": round(median["one_buffer"], 1),
        "target_ratio": 0.5,
        "mb": round(num_bytes / 1e6),
        "rows": num_rows,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "text_tokens": args.text_tokens,
        "text_length": args.text_length,
        "num_workers": args.num_workers,
        "prepare_seconds": round(prepare_seconds, 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
