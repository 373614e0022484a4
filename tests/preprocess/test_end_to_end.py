"""Real clips through Wan's own encoders (with random weights) to rows, to a picture, and to a trained student."""

import shutil

import numpy as np
import pytest
import torch
from made_clips import real_clips
from PIL import Image
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_runs import assert_same_state, checkpoint, finetune_config, metrics, train

from fv_distill.cli import main
from fv_distill.data import DataError, ParquetDataset
from fv_distill.models.wan_encoders import WanEncoders
from fv_distill.preprocess.decode import ClipFormat, decode_clip
from fv_distill.preprocess.inspect import inspect_rows


@pytest.fixture(scope="module")
def rows(tiny_wan, tmp_path_factory):
    """Rows of the real clips, in buckets."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "clips").mkdir()
    for path in real_clips():
        shutil.copy(path, folder / "clips")
        (folder / "clips" / f"{path.stem}.txt").write_text(f"a handwritten {path.stem}")
    (folder / "clips" / "broken.mp4").write_bytes(real_clips()[0].read_bytes()[:5000])
    words = ["--num-frames", "9", "--fps", "8", "--max-area", "48x64", "--text-length", str(TEXT_LENGTH)]
    paths = ["--model", str(tiny_wan), "--data", str(folder / "clips"), "--output", str(folder / "rows")]
    main(["preprocess", *paths, *words])
    return folder / "rows"


def test_rows_are_what_the_encoders_make_of_the_clips(tiny_wan, rows, tmp_path):
    dataset = ParquetDataset(rows, cache_dir=tmp_path / "cache")
    assert len(dataset) == 4 and len(dataset.buckets) == 3
    encoders = WanEncoders(tiny_wan, device=torch.device("cpu"), dtype=torch.float32, text_length=TEXT_LENGTH)
    paths = {path.name: path for path in real_clips()}
    for index in range(4):
        row = dataset[index]
        size = (row["height"], row["width"])
        clip = decode_clip(paths[row["file_name"]], ClipFormat(num_frames=9, fps=8, sizes=[size]))
        video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float() / 255
        assert torch.allclose(row["vae_latent"], encoders.encode_video(video)[0], atol=1e-5)
        text = encoders.encode_prompts([row["caption"]])
        assert row["text_embedding"].shape == (4, TEXT_DIM) and int(text.text_mask.sum()) == 4
        assert torch.allclose(row["text_embedding"], text.text[0, :4], atol=1e-5)


def test_a_student_trains_on_them(tiny_wan, rows, tmp_path):
    """Batches of two out of buckets of one and two rows; the same steps again are the same."""
    lines = []
    for name in ("one", "two"):
        config = finetune_config(tiny_wan, rows, tmp_path / name)
        config["training"]["data"]["cache_dir"] = str(tmp_path / "cache")
        lines.append([line["loss/student"] for line in metrics(train(config))])
    assert len(lines[0]) == 4 and np.isfinite(lines[0]).all() and lines[0] == lines[1]


def test_a_run_over_buckets_resumes_bit_by_bit(tiny_wan, rows, tmp_path):
    """Two steps are an epoch of four rows in three buckets or less; the break is in the middle of the second one."""
    whole, broken = (finetune_config(tiny_wan, rows, tmp_path / name) for name in ("whole", "broken"))
    for config in (whole, broken):
        config["training"]["data"] |= {"cache_dir": str(tmp_path / "cache"), "caption_dropout": 0.3}
        config["training"]["checkpoint"]["every_steps"] = 3
    train(whole, {"training.loop.max_train_steps": 7})
    train(broken, {"training.loop.max_train_steps": 3})
    train(broken, {"training.loop.max_train_steps": 7, "training.checkpoint.resume_from_checkpoint": "latest"})
    losses = [[line["loss/student"] for line in metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert len(losses[0]) == 7 and losses[0] == losses[1]
    one, other = (checkpoint(tmp_path / name, 7) for name in ("whole", "broken"))
    assert_same_state(one, other, num_networks=1, num_optimizers=1)


def test_a_bucket_that_does_not_fit_the_student_is_found_before_training(tiny_wan, rows, tmp_path):
    from fv_distill.data import write_rows

    shutil.copytree(rows, tmp_path / "rows")
    text = torch.ones(2, TEXT_DIM)
    odd = {"caption": "odd", "text_embedding": text, "vae_latent": torch.zeros(4, 3, 3, 4)}
    write_rows(tmp_path / "rows" / "zz.parquet", [odd])
    with pytest.raises(ValueError, match=r"\(4, 3, 3, 4\).*H=3 does not divide by the patch size 2"):
        train(finetune_config(tiny_wan, tmp_path / "rows", tmp_path / "run"))


def test_inspect_prints_and_draws(rows, tmp_path, capsys):
    main(["inspect", str(rows), "--output", str(tmp_path / "sheet.png"), "--rows", "3", "--samples", "4"])
    printed = capsys.readouterr().out
    assert "4 rows in 1 files, 4 distinct captions" in printed and "texts have 4 to 4 tokens" in printed
    assert "[tokens, 16] float32" in printed and "[4, 3, 6, 8] float32" in printed
    assert "a handwritten" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), dtype=float)
    # Four lines of five frames with colours on white ground.
    assert sheet.width > 5 * 64 and sheet.height > 4 * 48
    assert (np.ptp(pixels, axis=-1) > 20).mean() > 0.2 and (pixels == 255).all(-1).mean() > 0.02


def test_inspect_of_other_rows(tiny_wan, tiny_rows, tmp_path, capsys):
    """Rows that were not made by preprocess: no picture without a model, one with it; the middle file of several."""
    shutil.copytree(tiny_rows, tmp_path / "rows")
    shutil.copy(tmp_path / "rows/rows.parquet", tmp_path / "rows/more.parquet")
    overview = inspect_rows(tmp_path / "rows")
    assert (overview.num_rows, overview.num_files, overview.num_captions, overview.tokens) == (12, 2, 1, (3, 5))
    assert overview.shapes == {
        "text_embedding": {"[tokens, 16] float32": 12},
        "vae_latent": {"[4, 3, 4, 4] float32": 12},
    }
    assert "give --model" in capsys.readouterr().out and not list((tmp_path / "rows").glob("*.png"))
    inspect_rows(tmp_path / "rows", model=str(tiny_wan), num_samples=1)
    assert (tmp_path / "rows/contact_sheet.png").is_file()


def test_inspect_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_rows(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no rows"):
        inspect_rows(tmp_path / "empty")


def test_errors_end_with_status_2(tiny_wan, tmp_path, capsys):
    words = ["--model", str(tiny_wan), "--data", str(tmp_path), "--output", str(tmp_path / "rows")]
    with pytest.raises(SystemExit) as caught:
        main(["preprocess", *words, "--resolution", "big"])
    assert caught.value.code == 2 and "error: resolution" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()
