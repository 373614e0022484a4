"""Every family's encoders are found by its pipeline, and the rows they make are what its adapter trains on."""

import json

import numpy as np
import pytest
import tiny_matrixgame2
from made_clips import make_frames, write_clip
from tiny_cosmos import make_tiny_cosmos2_directory, make_tiny_cosmos_directory
from tiny_hunyuan import (
    IMAGE_TEXT_LENGTH,
    make_tiny_hunyuan15_directory,
    make_tiny_hunyuan15_i2v_directory,
    make_tiny_hunyuan_directory,
    make_tiny_hunyuan_i2v_directory,
)
from tiny_kandinsky5 import make_tiny_kandinsky5_directory, make_tiny_kandinsky5_i2v_directory
from tiny_longcat import make_tiny_longcat_directory
from tiny_ltx2 import make_tiny_ltx2_directory
from tiny_models import make_tiny_wan_directory
from tiny_runs import metrics, train
from tiny_wan import (
    CLIP_TEXT_LENGTH,
    make_ti2v_directory,
    make_wan21_i2v_directory,
    make_wan22_i2v_directory,
    make_wan22_t2v_directory,
)

import fv_distill.models
from fv_distill.config.instantiate import resolve_target
from fv_distill.data import ParquetDataset
from fv_distill.models.pretrained import read_pipeline_class
from fv_distill.preprocess import PreprocessOptions, preprocess
from fv_distill.preprocess.encode import Geometry, read_geometry
from fv_distill.preprocess.families import ENCODERS_BY_PIPELINE, encoders_class
from fv_distill.preprocess.inspect import inspect_rows

NUM_FRAMES = 9
# Of the families whose clips have to be longer.
LONGER = {"kandinsky5_i2v": 17}
# Those whose rows hold the first frame.
IMAGES = (
    "wan21_i2v",
    "wan22_i2v",
    "hunyuan_i2v",
    "hunyuan_i2v_concat",
    "hunyuan15_i2v",
    "kandinsky5_i2v",
    "matrixgame2",
    "matrixgame2_keyboard",
)


def published_longcat(path):
    return make_tiny_longcat_directory(path, published=True)


def keyboard_only(path):
    """As Temple Run's."""
    return tiny_matrixgame2.make_directory(path, enable_mouse=False)


def hunyuan_concat(path):
    return make_tiny_hunyuan_i2v_directory(path, kind="latent_concat")


# The adapter; the directory's maker; frames per latent frame; pixels per patch; further options of the student.
FAMILIES = {
    "wan": ("WanModel", make_tiny_wan_directory, 4, 16, {}),
    "wan21_i2v": ("WanImageToVideoModel", make_wan21_i2v_directory, 4, 16, {}),
    "wan22_i2v": ("WanImageToVideoModel", make_wan22_i2v_directory, 4, 16, {"expert": "high"}),
    "wan22_t2v": ("WanModel", make_wan22_t2v_directory, 4, 16, {"expert": "low"}),
    "ti2v": ("WanImageToVideoModel", make_ti2v_directory, 4, 32, {}),
    "hunyuan": ("HunyuanVideoModel", make_tiny_hunyuan_directory, 4, 16, {}),
    "hunyuan_i2v": ("HunyuanVideoImageToVideoModel", make_tiny_hunyuan_i2v_directory, 4, 16, {}),
    "hunyuan_i2v_concat": ("HunyuanVideoImageToVideoModel", hunyuan_concat, 4, 16, {}),
    "hunyuan15": ("HunyuanVideo15Model", make_tiny_hunyuan15_directory, 4, 16, {}),
    "hunyuan15_i2v": ("HunyuanVideo15Model", make_tiny_hunyuan15_i2v_directory, 4, 16, {}),
    "cosmos25": ("CosmosModel", make_tiny_cosmos_directory, 4, 16, {}),
    "cosmos2": ("CosmosModel", make_tiny_cosmos2_directory, 4, 16, {}),
    "kandinsky5": ("Kandinsky5Model", make_tiny_kandinsky5_directory, 4, 16, {}),
    "kandinsky5_i2v": ("Kandinsky5Model", make_tiny_kandinsky5_i2v_directory, 4, 16, {"condition_frames": 1}),
    "ltx2": ("LTX2VideoModel", make_tiny_ltx2_directory, 8, 32, {}),
    "longcat": ("LongCatVideoModel", make_tiny_longcat_directory, 4, 16, {}),
    "longcat_published": ("LongCatVideoModel", published_longcat, 4, 16, {}),
    "matrixgame2": ("MatrixGame2Model", tiny_matrixgame2.make_directory, 4, 16, {}),
    "matrixgame2_keyboard": ("MatrixGame2Model", keyboard_only, 4, 16, {}),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips with captions and actions; the one is longer."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        length = max(LONGER.values()) + number
        write_clip(folder / f"clip{number}.mp4", make_frames(length, 64, 64))
        (folder / f"clip{number}.txt").write_text("a digit")
        keys = np.eye(tiny_matrixgame2.KEYS)[np.arange(length) % tiny_matrixgame2.KEYS]
        np.savez(folder / f"clip{number}.npz", mouse=np.full((length, 2), 0.1), keyboard=keys)
    return folder


@pytest.mark.parametrize("name", [name for name in fv_distill.models.__all__ if name.endswith("Model")])
def test_every_adapter_has_its_pipeline(name):
    registered = {resolve_target(path) for path in ENCODERS_BY_PIPELINE.values()}
    assert getattr(fv_distill.models, name).encoders_class in registered
    assert name in {family[0] for family in FAMILIES.values()} | {"CausalWanModel", "CausalMatrixGame2Model"}


def test_an_unknown_pipeline_is_told_what_to_do(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="is a FluxPipeline; encoders are known for .*WanPipeline.*--adapter"):
        encoders_class(tmp_path, None)


def test_who_reads_no_text_needs_no_captions(tmp_path, capsys):
    """Nor a mouse, where the network has none; but videos."""
    directory = keyboard_only(tmp_path / "model")
    write_clip(tmp_path / "data/silent.mp4", make_frames(NUM_FRAMES))
    (tmp_path / "data/silent.json").write_text(json.dumps({"keyboard": [[1, 0, 0]] * NUM_FRAMES}))
    options = {"model": str(directory), "output": str(tmp_path / "rows"), "num_frames": NUM_FRAMES, "device": "cpu"}
    options |= {"resolution": "32x48", "actions": True}
    summary = preprocess(PreprocessOptions(data=str(tmp_path / "data"), **options))
    assert summary.rows == 1 and not summary.skipped
    row = ParquetDataset(tmp_path / "rows", required=(), cache_dir=tmp_path / "cache")[0]
    assert row["caption"] == "" and row["keyboard_cond"].shape == (NUM_FRAMES, 3)
    capsys.readouterr()
    overview = inspect_rows(tmp_path / "rows")
    assert "text_embedding" not in overview.shapes and (tmp_path / "rows/contact_sheet.png").is_file()
    assert "tokens" not in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "prompts.txt").write_text("a digit\n")
    with pytest.raises(ValueError, match="has no videos, and .*model reads no text"):
        preprocess(PreprocessOptions(data=str(tmp_path / "prompts.txt"), **options))


def test_clips_too_short_for_a_pipeline_are_refused_at_the_start(clips, tmp_path):
    options = {"model": str(make_tiny_kandinsky5_i2v_directory(tmp_path / "model")), "data": str(clips)}
    options |= {"output": str(tmp_path / "rows"), "resolution": "64x64", "device": "cpu"}
    with pytest.raises(ValueError, match="num-frames: 13 are too few: .* take 17 or more"):
        preprocess(PreprocessOptions(num_frames=13, **options))
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_train_the_adapter(family, clips, tmp_path):
    adapter, make, temporal, multiple, options = FAMILIES[family]
    directory = make(tmp_path / family)
    assert read_pipeline_class(directory) in ENCODERS_BY_PIPELINE
    assert read_geometry(directory) == Geometry(temporal, multiple)
    is_game = adapter == "MatrixGame2Model"
    text_length = {
        "wan21_i2v": CLIP_TEXT_LENGTH,
        "hunyuan_i2v": IMAGE_TEXT_LENGTH,
        "hunyuan_i2v_concat": IMAGE_TEXT_LENGTH,
    }.get(family, 16)
    summary = preprocess(
        PreprocessOptions(
            model=str(directory),
            data=str(clips),
            output=str(tmp_path / "rows"),
            num_frames=LONGER.get(family, NUM_FRAMES),
            resolution="64x64",
            text_length=text_length,
            actions=is_game,
            device="cpu",
        )
    )
    assert summary.rows == 2 and not summary.skipped
    row = ParquetDataset(tmp_path / "rows", required=(), cache_dir=tmp_path / "cache")[0]
    assert (row.get("text_embedding") is None) is is_game
    assert (row.get("first_frame_latent") is not None) is (family in IMAGES)
    assert (row.get("keyboard_cond") is not None) is is_game
    assert (row.get("mouse_cond") is not None) is (family == "matrixgame2")
    config = {
        "models": {
            "student": {
                "_target_": f"fv_distill.models.{adapter}",
                "init_from": str(directory),
                "trainable": True,
                "flow_shift": 5.0,
                **options,
            }
        },
        "method": {"_target_": "fv_distill.methods.FineTuneMethod"},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "data": {
                "data_path": str(tmp_path / "rows"),
                "train_batch_size": 2,
                "text_length": text_length,
                "cache_dir": str(tmp_path / "cache"),
            },
            "loop": {"max_train_steps": 1},
            "tracker": {"trackers": []},
        },
    }
    assert np.isfinite([line["loss/student"] for line in metrics(train(config))]).all()
