"""Whole runs: what rows hold, restarts, kills, several processes, and options that don't fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_preprocess import exit_code
from made_clips import make_frames, write_clip
from PIL import Image
from sampled_encoders import TEXT_WIDTH, SampledEncoders

from fv_distill.config import ConfigError
from fv_distill.config.validation import validate
from fv_distill.preprocess import PreprocessOptions
from fv_distill.preprocess.text_cache import TextCache

NUM_CLIPS = 7


@pytest.fixture
def data(tmp_path) -> Path:
    """Seven clips, two captions, three files that are no good."""
    folder = tmp_path / "data"
    for number in range(NUM_CLIPS):
        write_clip(folder / f"clip{number}.mp4", make_frames(6 + number))
        (folder / f"clip{number}.txt").write_text("an even number" if number % 2 == 0 else "odd")
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "broken.txt").write_text("only here")
    write_clip(folder / "short.mp4", make_frames(4))
    (folder / "short.txt").write_text("odd")
    write_clip(folder / "silent.mp4", make_frames(6))
    return folder


def as_options(tiny_wan, data, output, **options):
    return {
        "model": str(tiny_wan),
        "data": str(data),
        "output": str(output),
        "adapter": "sampled_encoders.SampledModel",
        "num_frames": 5,
        "text_length": 4,
        "resolution": "32x48",
        **options,
    }


def assert_complete(rows, summary):
    assert set(rows) == {f"clip{number}.mp4" for number in range(NUM_CLIPS)}
    assert summary["items"] == NUM_CLIPS + 3 and summary["rows"] == NUM_CLIPS
    assert summary["skipped"] == {"corrupt": 1, "no caption": 1, "too short": 1}
    assert summary["shapes"] == {"[3, 2, 4, 6]": NUM_CLIPS}


def stored_summary(output):
    return json.loads((output / "summary.json").read_text())


def test_rows_hold_what_the_encoders_made(tmp_path, data, run, read_rows):
    run(data, shard_rows=3)
    rows = read_rows()
    assert_complete(rows, stored_summary(tmp_path / "rows"))
    assert [path.name for path in sorted((tmp_path / "rows").glob("*.parquet"))] == [
        f"part-00000-00000{number}.parquet" for number in range(3)
    ]
    row = rows["clip0.mp4"]
    # Frames 0 and 4 at every eighth pixel; the upper left quarter is white.
    latent = 255 * row["vae_latent"]
    assert latent.shape == (3, 2, 4, 6) and latent[:, :, :2, :3].min() > 250
    assert latent[:, :, 2:].mean((0, 2, 3)).tolist() == pytest.approx([20, 52], abs=2)
    # "an even number" without padding, and what else belongs to a caption.
    assert torch.equal(row["text_embedding"], torch.full((3, TEXT_WIDTH), 14.0))
    assert torch.equal(row["pooled_text_embedding"], torch.full((3,), 14.0))


def test_a_caption_is_encoded_once(data, run):
    run(data)
    assert sorted(SampledEncoders.prompts) == ["an even number", "odd", "only here"]


def test_text_that_reads_the_image_belongs_to_its_clip(tmp_path, data, run, read_rows):
    """Clips of one caption have texts of their own, in the texts' type; the captions' folder is never there."""
    options = {"adapter": "sampled_encoders.ReadingModel", "text_dtype": "bfloat16"}
    write_clip(data / "clip2.mp4", 255 - make_frames(6))
    run(data, **options, shard_rows=2)
    rows = read_rows()
    assert_complete(rows, stored_summary(tmp_path / "rows"))
    assert sorted(SampledEncoders.prompts) == ["an even number"] * 4 + ["odd"] * 3
    assert {encoders.dtype for encoders in SampledEncoders.made} == {torch.float32, torch.bfloat16}
    pooled = [rows[f"clip{number}.mp4"]["pooled_text_embedding"] for number in (0, 2)]
    assert (pooled[0] - pooled[1]).abs().max() > 0.1
    # What is there isn't encoded again, and what is missing is.
    SampledEncoders.prompts.clear()
    next((tmp_path / "rows").glob("part-*1.parquet")).unlink()
    run(data, **options, shard_rows=2)
    assert len(SampledEncoders.prompts) == 2
    for key, row in read_rows().items():
        assert torch.equal(row["pooled_text_embedding"], rows[key]["pooled_text_embedding"])


def test_prompts_alone_are_no_rows_of_text_that_reads_the_image(tmp_path, run):
    (tmp_path / "prompts.txt").write_text("a digit\n")
    with pytest.raises(ValueError, match="has no videos, but the text encoder of .* prompts alone make no rows"):
        run(tmp_path / "prompts.txt", adapter="sampled_encoders.ReadingModel")


def test_captions_and_clips_have_their_own_types(data, run, tmp_path):
    import pyarrow.parquet as pq

    run(data, text_dtype="bfloat16", vae_dtype="float32", latent_dtype="float16")
    texts, clips = SampledEncoders.made
    assert (texts.dtype, clips.dtype) == (torch.bfloat16, torch.float32) and texts.text_length == 4
    (shard,) = (tmp_path / "rows").glob("*.parquet")
    row = pq.read_table(shard).slice(0, 1).to_pylist()[0]
    assert (row["text_embedding_dtype"], row["vae_latent_dtype"]) == ("bfloat16", "float16")


def test_image_conditions_are_columns(data, run, read_rows):
    run(data, adapter="sampled_encoders.ImageModel")
    row = read_rows()["clip1.mp4"]
    assert torch.equal(row["first_frame_latent"], row["vae_latent"][:, :1]) and row["clip_feature"].shape == (1, 3)


@pytest.mark.parametrize(("choice", "resolution", "tiled"), [("auto", "32x48", False), ("on", "32x48", True)])
def test_tiling(data, run, choice, resolution, tiled):
    run(data, vae_tiling=choice, resolution=resolution)
    assert SampledEncoders.made[-1].vae.tiled == [tiled]


def test_tiling_of_large_clips(tmp_path, run):
    write_clip(tmp_path / "data/a.mp4", make_frames(1, 64, 96))
    (tmp_path / "data/a.txt").write_text("large")
    for choice, tiled in (("auto", True), ("off", False)):
        run(tmp_path / "data", vae_tiling=choice, resolution="768x1216", num_frames=1, output=str(tmp_path / choice))
        assert SampledEncoders.made[-1].vae.tiled == [tiled]


def test_a_clip_that_the_vae_overflows_on_is_skipped(tmp_path, run):
    for name, frames in {"good": make_frames(5), "red": make_frames(5) * 0}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / f"data/{name}.txt").write_text(name)
        frames[..., 0] = 255
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / f"data/{name}/{number}.png")
    summary = run(tmp_path / "data")
    assert [(clip["clip"], clip["reason"]) for clip in summary.skipped_clips] == [("red", "not finite")]


def test_several_clips_of_a_video(tmp_path, run, read_rows):
    write_clip(tmp_path / "data/long.mp4", make_frames(26))
    (tmp_path / "data/long.txt").write_text("long")
    # The rows of one video stay in one file, so that it is done or not.
    run(tmp_path / "data", clips_per_video=3, shard_rows=2)
    rows = read_rows()
    assert list(rows) == ["long.mp4#0", "long.mp4#1", "long.mp4#2"]
    assert {row["file_name"] for row in rows.values()} == {"long.mp4"}
    assert len(list((tmp_path / "rows").glob("*.parquet"))) == 1
    first = [round(255 * float(row["vae_latent"][0, 0, -1, -1])) for row in rows.values()]
    assert first == pytest.approx([20, 20 + 8 * 10, 20 + 8 * 21], abs=2)


def test_buckets_and_what_trains_on_them(tmp_path, run):
    for name, (height, width) in {"wide": (32, 64), "tall": (64, 32), "square": (40, 40)}.items():
        write_clip(tmp_path / f"data/{name}.mp4", make_frames(6, height, width))
        (tmp_path / f"data/{name}.txt").write_text(name)
    summary = run(tmp_path / "data", buckets=["32x48", "48x32", "32x32"])
    assert summary.shapes == {"[3, 2, 4, 4]": 1, "[3, 2, 6, 4]": 1, "[3, 2, 4, 6]": 1}
    summary = run(tmp_path / "data", max_area="64x64", output=str(tmp_path / "by_area"))
    assert summary.shapes == {"[3, 2, 8, 8]": 1, "[3, 2, 10, 6]": 1, "[3, 2, 6, 10]": 1}


def test_a_second_run_finds_all_done_and_takes_what_is_new(tmp_path, data, run, read_rows):
    run(data)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*.parquet")}
    SampledEncoders.prompts.clear()
    write_clip(data / "short.mp4", make_frames(5))
    write_clip(data / "new.mp4", make_frames(5))
    (data / "new.txt").write_text("new")
    summary = run(data)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = read_rows()
    assert len(rows) == NUM_CLIPS + 2 and {"new.mp4", "short.mp4"} < set(rows)
    # Mended clips are no longer reported, and captions whose clips are done are not encoded again.
    assert summary.skipped == {"corrupt": 1, "no caption": 1} and summary.items == NUM_CLIPS + 4
    assert sorted(SampledEncoders.prompts) == ["new", "odd", "only here"]


def test_other_options_are_refused_or_overwrite(tmp_path, data, run, read_rows):
    run(data)
    with pytest.raises(ValueError, match=r"were made with resolution='32x48', now it is '48x32'.*--overwrite"):
        run(data, resolution="48x32")
    # How the work is done may change.
    run(data, shard_rows=1, decode_workers=1, clip_timeout=9)
    run(data, resolution="48x32", overwrite=True)
    rows = read_rows()
    assert len(rows) == NUM_CLIPS and all(row["vae_latent"].shape == (3, 2, 6, 4) for row in rows.values())


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *[("mkdir", 1), ("open", 2), ("open", 3), ("remove", 2), ("rmdir", 1)],
        # The settings, a caption, a file of rows, the summary.
        *[("rename", number) for number in (1, 3, 6, 9)],
        *[("tensor", number) for number in (1, 8, 30)],
    ],
)
def test_a_run_killed_anywhere_goes_on(tmp_path, tiny_wan, data, run, read_rows, kind, number):
    options = as_options(tiny_wan, data, tmp_path / "rows", shard_rows=2)
    assert exit_code(options, kind, number) == -9
    run(data, shard_rows=2)
    assert_complete(read_rows(), stored_summary(tmp_path / "rows"))
    # Nothing is left of the killed one.
    left = [path.name for path in (tmp_path / "rows").iterdir() if ".tmp" in path.name or path.is_dir()]
    assert left == []


@pytest.mark.parametrize(("kind", "number"), [("rename", 1), ("rename", 3), ("open", 3), ("tensor", 5)])
def test_a_killed_run_whose_text_reads_the_image_goes_on(tmp_path, tiny_wan, data, run, read_rows, kind, number):
    reading = {"adapter": "sampled_encoders.ReadingModel", "shard_rows": 2}
    assert exit_code(as_options(tiny_wan, data, tmp_path / "rows", **reading), kind, number) == -9
    run(data, **reading)
    assert_complete(read_rows(), stored_summary(tmp_path / "rows"))


def test_a_killed_run_keeps_its_finished_files(tmp_path, tiny_wan, data, run):
    # The settings, three captions and two files of rows.
    assert exit_code(as_options(tiny_wan, data, tmp_path / "rows", shard_rows=2), "rename", 6) == -9
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*.parquet")}
    assert len(before) == 1
    run(data, shard_rows=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # What was encoded before the kill is not encoded again.
    assert SampledEncoders.prompts == []


@pytest.mark.parametrize("adapter", ["SampledModel", "ReadingModel"])
def test_two_processes_share_the_work(tmp_path, tiny_wan, data, run, read_rows, adapter):
    """As one process does it, but for the files' names; and with the other's rows half there."""
    adapter = f"sampled_encoders.{adapter}"
    run(data, adapter=adapter)
    alone = read_rows()
    options = as_options(tiny_wan, data, tmp_path / "shared", shard_rows=2, adapter=adapter)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fv_distill", "preprocess"]
    done = subprocess.run(
        [sys.executable, *command, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("7 rows of 10 items") == 1
    shared = read_rows("shared")
    assert_complete(shared, stored_summary(tmp_path / "shared"))
    for key, row in alone.items():
        assert torch.equal(shared[key]["vae_latent"], row["vae_latent"])
        for name in ("text_embedding", "pooled_text_embedding"):
            assert torch.equal(shared[key][name], row[name])
    ranks = {path.name[:10] for path in (tmp_path / "shared").glob("*.parquet")}
    assert ranks == {"part-00000", "part-00001"}
    # One process goes on with what two have begun.
    next((tmp_path / "shared").glob("part-00001-*.parquet")).unlink()
    run(data, output=str(tmp_path / "shared"), adapter=adapter)
    assert_complete(read_rows("shared"), stored_summary(tmp_path / "shared"))


def test_ranks_share_captions_without_overlap():
    from fv_distill.preprocess.text_cache import share_of

    captions = [f"caption {number % 50}" for number in range(200)]
    shares = [share_of(iter(captions), rank=rank, num_ranks=3) for rank in range(3)]
    assert sorted(caption for share in shares for caption in share) == sorted(set(captions))
    assert all(len(share) > 5 for share in shares)


def test_text_cache_survives_a_torn_write(tmp_path):
    cache = TextCache(tmp_path / "texts")
    cache.save("a", {"text_embedding": torch.ones(2, 3, dtype=torch.bfloat16)})
    assert cache.has("a") and not cache.has("b")
    assert torch.equal(cache.load("a")["text_embedding"], torch.ones(2, 3, dtype=torch.bfloat16))
    cache.remove()
    assert not cache.has("a") and not (tmp_path / "texts").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 6}, "num-frames: 6 is not 4k\\+1, which this model's VAE needs; take 5 or 9"),
        ({"resolution": "30x48"}, "resolution: 30x48 does not divide by 16, .* the nearest size is 32x48"),
        ({"resolution": None}, "the clips need a size: give --resolution HxW"),
        ({"buckets": ["32x48", "33x40"]}, "buckets: 33x40 does not divide by 16"),
        ({"max_area": "8x8"}, "max-area: 64 pixels are less than the smallest clip, 16x16"),
        ({"adapter": None, "model": "nowhere"}, "model='nowhere': no such directory"),
        ({"adapter": "made_clips.make_frames"}, "made_clips.make_frames is no model adapter"),
        ({"adapter": "made_clips.nothing"}, "has no 'nothing'"),
    ],
)
def test_options_that_do_not_fit(data, run, options, message):
    with pytest.raises((ValueError, FileNotFoundError, TypeError, ImportError), match=message):
        run(data, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "big"}, "'big' is no size"),
        ({"buckets": []}, "no sizes"),
        ({"resolution": "32x48", "max-area": "32x48"}, "resolution and max-area exclude each other"),
        ({"num-frames": 0}, "num-frames"),
        ({"crop": "middle"}, "center.*letterbox"),
        ({"num-frame": 5}, "did you mean num-frames"),
    ],
)
def test_options_that_are_no_options(options, message):
    with pytest.raises(ConfigError, match=message):
        validate(PreprocessOptions, {"model": "m", "data": "d", "output": "o", **options})


def test_a_pipeline_of_no_known_family(tmp_path, data, run):
    (tmp_path / "model/vae").mkdir(parents=True)
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    (tmp_path / "model/vae/config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ValueError, match="is a MochiPipeline; encoders are known for .*WanPipeline.* --adapter"):
        run(data, adapter=None, model=str(tmp_path / "model"))
    # Older directories don't say what is their class's default.
    assert run(data, model=str(tmp_path / "model")).rows == NUM_CLIPS
