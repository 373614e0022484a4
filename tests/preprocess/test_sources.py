"""Where clips and captions come from, and what is said of those that can't be used."""

import json

import datasets
import numpy as np
import pytest
import torch
from made_clips import make_frames, write_clip
from PIL import Image

from fv_distill.data import DataError, write_rows
from fv_distill.preprocess.decode import BadClipError
from fv_distill.preprocess.sources import FolderSource, checked_caption


def caption_of(source, key):
    return source.caption([source.key(index) for index in range(len(source))].index(key))


def test_captions_beside_the_videos(tmp_path, run, read_rows):
    for name in ("a.mp4", "b.webm", "deep/c.gif", "deep/er/d.mkv"):
        write_clip(tmp_path / "data" / name, make_frames(6))
    (tmp_path / "data/a.txt").write_text("a text\n of two lines\n")
    (tmp_path / "data/b.json").write_text(json.dumps({"caption": "from json"}))
    (tmp_path / "data/deep/c.json").write_text(json.dumps(["first of", "a list"]))
    (tmp_path / "data/deep/er/d.json").write_text(json.dumps({"prompt": "named otherwise"}))
    summary = run(tmp_path / "data")
    rows = read_rows()
    assert {key: row["caption"] for key, row in rows.items()} == {
        "a.mp4": "a text of two lines",
        "b.webm": "from json",
        "deep/c.gif": "first of",
        "deep/er/d.mkv": "named otherwise",
    }
    assert (summary.items, summary.rows, summary.skipped) == (4, 4, {})
    row = rows["a.mp4"]
    assert (row["file_name"], row["media_type"], row["num_frames"]) == ("a.mp4", "video", 5)
    assert (row["height"], row["width"], row["fps"], row["duration_sec"]) == (32, 48, 8.0, 5 / 8)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_names_files_and_captions(tmp_path, run, read_rows, kind):
    for name in ("a", "b", "c"):
        write_clip(tmp_path / f"data/train/{name}.mp4", make_frames(6))
    lines = [("a.mp4", "the first"), ("b.mp4", ""), ("gone.mp4", "lost")]
    if kind == "csv":
        text = "file_name,text\n" + "\n".join(",".join(line) for line in lines)
    else:
        text = "\n".join(json.dumps({"file_name": name, "text": caption}) for name, caption in lines)
    (tmp_path / f"data/train/metadata.{kind}").write_text(text)
    summary = run(tmp_path / "data")
    assert {key: row["caption"] for key, row in read_rows().items()} == {"train/a.mp4": "the first"}
    assert {clip["clip"]: clip["reason"] for clip in summary.skipped_clips} == {
        "train/b.mp4": "no caption",
        "train/c.mp4": "no caption",
        "train/gone.mp4": "missing file",
    }


def test_metadata_without_the_columns(tmp_path, run):
    write_clip(tmp_path / "data/a.mp4", make_frames(6))
    (tmp_path / "data/metadata.csv").write_text("file_name,words\na.mp4,hello\n")
    with pytest.raises(ValueError, match=r"metadata.csv, row 1 has the columns file_name, words; needed are .*caption"):
        run(tmp_path / "data")
    assert run(tmp_path / "data", caption_column="words").rows == 1


def test_folders_of_pictures(tmp_path, run, read_rows):
    for name in ("walk", "run"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, frame in enumerate(make_frames(11)):
            Image.fromarray(frame).save(tmp_path / f"data/{name}/{number}.png")
        (tmp_path / f"data/{name}.txt").write_text(f"they {name}")
    # Thumbnails beside videos are no clip.
    write_clip(tmp_path / "data/films/a.mp4", make_frames(6))
    (tmp_path / "data/films/a.txt").write_text("a film")
    Image.fromarray(make_frames(1)[0]).save(tmp_path / "data/films/a.jpg")
    run(tmp_path / "data", num_frames=9)
    rows = read_rows()
    assert {key: row["caption"] for key, row in rows.items()} == {"walk": "they walk", "run": "they run"}
    levels = (255 * rows["walk"]["vae_latent"][0, :, -1, -1]).round().int().tolist()
    # Frames 0, 4 and 8; 10.png comes behind them.
    assert levels == pytest.approx([20, 52, 84], abs=2)
    assert rows["walk"]["fps"] is None


def test_single_pictures(tmp_path, run, read_rows):
    (tmp_path / "data").mkdir()
    Image.fromarray(make_frames(1)[0]).save(tmp_path / "data/a.png")
    (tmp_path / "data/a.txt").write_text("one picture")
    run(tmp_path / "data", num_frames=1)
    row = read_rows()["a.png"]
    assert row["media_type"] == "image" and row["vae_latent"].shape == (3, 1, 4, 6)


def test_unusable_captions(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.txt").write_text("  \n")
    (tmp_path / "e.json").write_text('{"title": "x"}')
    source = FolderSource(tmp_path)
    reasons = {"a": "no caption", "b": "unreadable caption", "c": "unreadable caption", "d": "no caption"}
    for name, reason in {**reasons, "e": "no caption"}.items():
        with pytest.raises(BadClipError, match=f"^{reason}"):
            caption_of(source, f"{name}.mp4")
    for value in (None, "", 3, [], {"a": 1}, float("nan")):
        with pytest.raises(BadClipError, match="no caption"):
            checked_caption(value)


def test_hf_data_sets(tmp_path, run, read_rows):
    path = write_clip(tmp_path / "a.mp4", make_frames(6))
    dataset = datasets.Dataset.from_dict(
        {
            "video": [{"bytes": path.read_bytes(), "path": None}, {"bytes": b"no video", "path": None}, None],
            "text": ["some bytes", "broken", "nothing"],
        }
    ).cast_column("video", datasets.Video(decode=False))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "saved")
    summary = run(tmp_path / "saved")
    assert {key: row["caption"] for key, row in read_rows().items()} == {"row-00000000": "some bytes"}
    assert summary.skipped == {"corrupt": 1, "missing file": 1}
    assert run(tmp_path / "saved", split="test", output=str(tmp_path / "other")).items == 1
    with pytest.raises(ValueError, match="split: .*saved has no 'dev', only train, test"):
        run(tmp_path / "saved", split="dev", output=str(tmp_path / "third"))
    dataset.to_parquet(tmp_path / "parquet" / "part.parquet")
    assert run(tmp_path / "parquet", output=str(tmp_path / "fourth")).rows == 1
    with pytest.raises(ValueError, match="caption-column: the data set has none of words; its columns are video, text"):
        run(tmp_path / "parquet", caption_column="words", output=str(tmp_path / "fifth"))


@pytest.mark.parametrize("kind", ["file", "hf"])
def test_prompts_alone(tmp_path, run, read_rows, kind):
    prompts = ["one", "two words", "one"]
    if kind == "file":
        data = tmp_path / "prompts.txt"
        data.write_text("\n".join(prompts))
    else:
        data = tmp_path / "saved"
        datasets.Dataset.from_dict({"prompt": prompts}).save_to_disk(data)
    # A text needs no size.
    summary = run(data, resolution=None)
    rows = list(read_rows().values())
    assert [row["caption"] for row in rows] == prompts and summary.rows == 3 and summary.shapes == {}
    assert all(row["media_type"] == "text" and "vae_latent" not in row for row in rows)
    assert [len(row["text_embedding"]) for row in rows] == [1, 2, 1]


def test_actions(tmp_path, run, read_rows):
    """At the frames that were taken, half of those in the file."""
    rng = np.random.default_rng(0)
    mouse, keys = rng.normal(size=(12, 2)), rng.integers(0, 2, (12, 4))
    for name in "abcdef":
        write_clip(tmp_path / f"data/{name}.mp4", make_frames(12))
        (tmp_path / f"data/{name}.txt").write_text(name)
    np.savez(tmp_path / "data/a.npz", mouse=mouse, keyboard=keys)
    (tmp_path / "data/b.json").write_text(json.dumps({"mouse": mouse.tolist(), "keyboard": keys.tolist()}))
    np.savez(tmp_path / "data/c.npz", mouse=mouse[:8], keyboard=keys)
    np.savez(tmp_path / "data/d.npz", mouse=np.array([object()]), keyboard=keys)
    np.savez(tmp_path / "data/e.npz", mouse=keys, keyboard=keys)
    summary = run(tmp_path / "data", fps=4, actions=True)
    rows = read_rows()
    assert set(rows) == {"a.mp4", "b.mp4"} and summary.skipped == {"bad actions": 4}
    for row in rows.values():
        assert torch.allclose(row["mouse_cond"], torch.tensor(mouse[:9:2]).float())
        assert torch.equal(row["keyboard_cond"], torch.tensor(keys[:9:2]).float())
    details = {clip["clip"]: clip["detail"] for clip in summary.skipped_clips}
    assert details["c.mp4"] == "c.npz: mouse has 8 rows, frame 8 is in the clip"
    assert "allow_pickle" in details["d.mp4"] and "[12, 4], not [F, 2]" in details["e.mp4"]


def test_data_that_is_nowhere(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="data: nowhere does not exist"):
        run("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no videos"):
        run(tmp_path / "empty")
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"a.mp4 is no folder and no file of prompts"):
        run(tmp_path / "a.mp4")


def test_no_row_at_all_is_an_error(tmp_path, run, capsys):
    write_clip(tmp_path / "data/a.mp4", make_frames(3))
    (tmp_path / "data/a.txt").write_text("short")
    with pytest.raises(DataError, match=r"no row could be made of .*data: 1 skipped \(too short\)"):
        run(tmp_path / "data")
    assert "a.mp4 (3 of 5 frames)" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows/summary.json").read_text())["skipped"] == {"too short": 1}


def test_rows_of_somebody_else_are_left_alone(tmp_path, run):
    write_rows(tmp_path / "rows/a.parquet", [{"caption": "a", "text_embedding": torch.ones(1, 2)}])
    (tmp_path / "prompts.txt").write_text("one")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds parquet files that this command didn't make"):
            run(tmp_path / "prompts.txt", overwrite=overwrite)
    assert (tmp_path / "rows/a.parquet").is_file()
