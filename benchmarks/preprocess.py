"""How fast `fv-distill preprocess` is, against decoding and encoding the same clips one after the other.

Makes a folder of H.264 clips and a Wan directory with a random VAE. `ratio` is the sum of the seconds that pure
decoding and pure encoding take, over the seconds of the pass over the clips, which also loads the VAE and writes the
rows: above 1 the two overlap. The sides take turns. `memory_ratio` is the peak memory of a process that has four times
as many clips over that of one that has the first ones.

    python benchmarks/preprocess.py
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKLWan

from fv_distill.models.wan_encoders import WanEncoders
from fv_distill.preprocess import PreprocessOptions
from fv_distill.preprocess.decode import Clip, ClipFormat, decode_clip
from fv_distill.preprocess.encode import encode_clip
from fv_distill.preprocess.run import Preprocessing

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits" / "teacher"
SOURCE_FPS = 30
TARGET_FPS = 15
LONGER = 4
TEXT_LENGTH = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--source", default="720x1280", help="size of the clips")
    parser.add_argument("--resolution", default="48x80", help="size of the rows")
    parser.add_argument("--num-frames", type=int, default=13)
    parser.add_argument("--vae-width", type=int, default=8, help="base_dim of the VAE; Wan's own has 96")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary files are made")
    parser.add_argument("--peak-of", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(folder: Path, width: int) -> Path:
    """A Wan directory: the digits' text encoder, and a random VAE of Wan's own layout."""
    shutil.copytree(DIGITS, folder, ignore=shutil.ignore_patterns("vae"))
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=width, z_dim=16).save_pretrained(folder / "vae")
    return folder


def make_clips(folder: Path, args: argparse.Namespace) -> None:
    """Clips of drifting stripes with grain, as much as is needed and half as much again."""
    folder.mkdir()
    height, width = map(int, args.source.split("x"))
    rng = np.random.default_rng(0)
    grain = rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
    columns = np.arange(width)[None, :, None]
    num_frames = args.num_frames * SOURCE_FPS // TARGET_FPS * 3 // 2
    for number in range(args.clips):
        path = folder / f"clip-{number:04d}.mp4"
        path.with_suffix(".txt").write_text(f"a handwritten {number % 7}")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=SOURCE_FPS, options={"preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for frame in range(num_frames):
                stripes = 110 + 100 * np.sin((columns + 6 * frame + 31 * number) / 40)
                pixels = stripes.astype(np.uint8) + np.roll(grain, frame, axis=0)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())


def copy_clips(source: Path, target: Path) -> Path:
    """The clips under `LONGER` names each."""
    target.mkdir()
    for path in source.iterdir():
        for number in range(LONGER):
            os.link(path, target / f"{number}-{path.name}")
    return target


def options_for(folder: Path, clips: Path, output: Path, args: argparse.Namespace) -> PreprocessOptions:
    return PreprocessOptions(
        model=str(folder / "model"),
        data=str(clips),
        output=str(output),
        num_frames=args.num_frames,
        fps=TARGET_FPS,
        resolution=args.resolution,
        text_length=TEXT_LENGTH,
        decode_workers=args.workers,
        device="cpu",
        shard_rows=4,
    )


def prepare(options: PreprocessOptions) -> Preprocessing:
    """All but the pass over the clips."""
    work = Preprocessing(options, PartialState(cpu=True))
    work.prepare_output()
    work.encode_texts()
    return work


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_speed(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    paths = sorted((folder / "clips").glob("*.mp4"))
    height, width = map(int, args.resolution.split("x"))
    wanted = ClipFormat(num_frames=args.num_frames, fps=TARGET_FPS, sizes=[(height, width)])
    encoders = WanEncoders(folder / "model", device=torch.device("cpu"), dtype=torch.float32, text_length=TEXT_LENGTH)
    decoded: list[Clip] = []

    def decode() -> None:
        decoded[:] = [decode_clip(path, wanted) for path in paths]

    def encode() -> None:
        with torch.no_grad():
            for clip in decoded:
                encode_clip(encoders, clip.frames, torch.float32)

    seconds: dict[str, list[float]] = {"decode": [], "encode": [], "whole": []}
    for repeat in range(args.repeats + 1):
        output = folder / f"rows-{repeat}"
        work = prepare(options_for(folder, folder / "clips", output, args))
        taken = {"decode": seconds_of(decode), "encode": seconds_of(encode), "whole": seconds_of(work.encode_clips)}
        assert work.finish().rows == args.clips
        if repeat:  # the first round warms caches
            for name, value in taken.items():
                seconds[name].append(value)
    ratios = [
        (decode + encode) / whole
        for decode, encode, whole in zip(seconds["decode"], seconds["encode"], seconds["whole"], strict=True)
    ]
    median = {f"{name}_s": round(statistics.median(values), 3) for name, values in seconds.items()}
    rate = args.clips / statistics.median(seconds["whole"])
    return {"ratio": round(statistics.median(ratios), 3), "clips_per_s": round(rate, 3), **median}


def peak_mb(folder: Path, clips: Path, args: argparse.Namespace) -> float:
    """The peak memory of a process of its own that preprocesses the clips."""
    given = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("resolution", "num_frames", "workers")]
    command = [sys.executable, __file__, *given, f"--folder={folder}", f"--peak-of={clips}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(args: argparse.Namespace) -> None:
    clips = Path(args.peak_of)
    work = prepare(options_for(Path(args.folder), clips, clips.with_name(f"{clips.name}-rows"), args))
    work.encode_clips()
    work.finish()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    args = parse_args()
    if args.peak_of:
        print_peak(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        make_model(folder / "model", args.vae_width)
        make_clips(folder / "clips", args)
        peaks = [peak_mb(folder, folder / "clips", args)]
        peaks.append(peak_mb(folder, copy_clips(folder / "clips", folder / "longer"), args))
        result = {
            "benchmark": "preprocess",
            **measure_speed(folder, args),
            "target_ratio": 0.85,
            "memory_ratio": round(peaks[1] / peaks[0], 3),
            "peak_mb": [round(peak) for peak in peaks],
            "clips": args.clips,
            "source": args.source,
            "resolution": args.resolution,
            "num_frames": args.num_frames,
            "threads": torch.get_num_threads(),
            "workers": args.workers,
            "load_average": os.getloadavg()[0],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
