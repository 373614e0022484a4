"""Prompts with a first frame: read, checked against the pipeline, cut to the clips' size."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fv_distill.callbacks import ValidationCallback
from fv_distill.callbacks.video_files import load_first_frame
from fv_distill.prompts import Prompt, read_prompt_rows, read_prompts

PIPELINE = "diffusers.WanImageToVideoPipeline"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "pictures/first.png"
    path.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_rows_name_images_relative_to_the_file(tmp_path, image):
    rows = [
        {"caption": "a", "image": "pictures/first.png"},
        {"prompt": "b", "image_path": str(image)},
        {"caption": "c"},
    ]
    path = write(tmp_path / "prompts.json", rows)
    assert read_prompt_rows(path) == [Prompt("a", image), Prompt("b", image), Prompt("c")]
    assert read_prompts(path) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="row 1: image=7 must be the path of an image"):
        read_prompt_rows(write(path, [{"caption": "a", "image": 7}]))


def test_a_pipeline_that_takes_an_image_wants_one_of_every_prompt(tmp_path, image):
    path = write(tmp_path / "prompts.json", [{"caption": "a", "image": str(image)}, {"caption": "b"}])
    with pytest.raises(ValueError, match="row 2 has no `image`, but diffusers.WanImageToVideoPipeline makes"):
        ValidationCallback(str(path), pipeline_target=PIPELINE)
    # The same file serves a pipeline that takes none.
    assert ValidationCallback(str(path)).images == [None, None]
    with pytest.raises(FileNotFoundError, match="row 1: .*nowhere.png is no file"):
        ValidationCallback(str(write(path, [{"caption": "a", "image": "nowhere.png"}])), pipeline_target=PIPELINE)


def test_a_pipeline_that_is_not_the_students_is_refused(tmp_path, tiny_wan, image):
    path = write(tmp_path / "prompts.json", [{"caption": "a", "image": str(image)}])
    trainer = SimpleNamespace(models={"student": SimpleNamespace(directory=tiny_wan, pipeline_config={})})
    with pytest.raises(ValueError, match="set it to diffusers.WanPipeline"):
        ValidationCallback(str(path), pipeline_target=PIPELINE)._check_images(trainer)
    ValidationCallback(str(path))._check_images(trainer)
    trainer.models["student"].pipeline_config = {"_class_name": "WanImageToVideoPipeline"}
    with pytest.raises(ValueError, match="set it to diffusers.WanImageToVideoPipeline"):
        ValidationCallback(str(path))._check_images(trainer)


@pytest.mark.parametrize(
    ("name", "target"), [("LongCatVideoPipeline", PIPELINE), ("MatrixGame2Pipeline", "diffusers.WanPipeline")]
)
def test_the_librarys_own_pipeline_is_advised_where_diffusers_has_none(tmp_path, image, name, target):
    """What is advised can be set: it is found and shows the student what it looks at."""
    path = str(write(tmp_path / "prompts.json", [{"caption": "a", "image": str(image)}]))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    trainer = SimpleNamespace(models={"student": SimpleNamespace(directory=tmp_path, pipeline_config={})})
    with pytest.raises(ValueError, match=f"set it to fv_distill.models.pipelines.{name}$") as error:
        ValidationCallback(path, pipeline_target=target)._check_images(trainer)
    advised = str(error.value).rsplit(" ", 1)[-1]
    ValidationCallback(path, pipeline_target=advised)._check_images(trainer)


def test_a_first_frame_is_cut_in_the_middle(tmp_path):
    """Scaled as a whole it would be squeezed, which no training clip is."""
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    frame = np.asarray(load_first_frame(tmp_path / "wide.png", 20, 20))
    assert frame.shape == (20, 20, 3) and frame.min() == 255
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="is no image that Pillow can read"):
        load_first_frame(tmp_path / "text.png", 20, 20)
