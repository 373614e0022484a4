"""The card of an export: valid front matter, nothing made up, nothing broken by user text, a snippet that runs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from tiny_models import TEXT_LENGTH, make_tiny_transformer

from fv_distill.callbacks.video_files import write_video
from fv_distill.export import StudentInfo, export_diffusers_directory, few_step_scheduler
from fv_distill.export.loss_chart import draw_losses
from fv_distill.export.markdown import code, table, text
from fv_distill.export.model_card import read_evaluation, refresh_model_card, write_model_card
from fv_distill.export.run_record import RunFiles, copy_run_assets, read_losses, training_record

SIGMAS = (1.0, 0.75)
CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": TEXT_LENGTH}


def base_with(folder, card, **files):
    """A base model's directory, as far as a card looks at it."""
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def card_of(tmp_path, info, base=None, name="student"):
    (tmp_path / "out").mkdir(exist_ok=True)
    write_model_card(tmp_path / "out/README.md", info, name=name, base=base)
    card = ModelCard.load(tmp_path / "out/README.md")
    return card.data.to_dict(), card.text


def test_a_hub_models_licence_is_inherited(tmp_path):
    front = "---\nlicense: other\nlicense_name: video-terms\nlicense_link: LICENSE.txt\nbase_model: someone/else\n---\n"
    base = base_with(tmp_path / "snapshot", front, NOTICE="made by someone")
    data, body = card_of(tmp_path, StudentInfo("owner/base", "m", SIGMAS), base)
    assert data["license"] == "other" and data["license_name"] == "video-terms"
    # The snapshot lacks the file, so the link leads to where it is.
    assert data["license_link"] == "https://huggingface.co/owner/base/blob/main/LICENSE.txt"
    assert data["base_model"] == "owner/base" and data["base_model_relation"] == "finetune"
    assert "video" in data["tags"] and "distillation" in data["tags"] and "lora" not in data["tags"]
    assert "inherited from `owner/base`. Copied from it: `NOTICE`." in body
    assert "[owner/base](https://huggingface.co/owner/base)" in body


def test_a_directorys_card_tells_licence_and_origin(tmp_path):
    front = "---\nlicense: apache-2.0\nlicense_link: LICENSE\nbase_model: owner/base\n---\n"
    base = base_with(tmp_path / "my-private-clone", front, LICENSE="terms")
    data, body = card_of(tmp_path, StudentInfo(str(base), "m", None), base)
    assert (data["license"], data["license_link"], data["base_model"]) == ("apache-2.0", "LICENSE", "owner/base")
    assert "distillation" not in data["tags"]
    assert "`my-private-clone`" in body and str(tmp_path) not in body


@pytest.mark.parametrize("card", [None, "# no front matter\n", "---\ntags: [x]\n---\n", "---\n[broken: yaml\n---\n"])
def test_a_licence_that_nobody_named_is_not_made_up(tmp_path, card):
    base = base_with(tmp_path / "base", card)
    data, body = card_of(tmp_path, StudentInfo(str(base), "m", SIGMAS), base)
    assert not {"license", "license_name", "license_link", "base_model"} & set(data)
    assert "Unknown: the card of `base` names no licence" in body


def test_licence_files_travel_with_an_export(tiny_wan, tmp_path):
    base = Path(shutil.copytree(tiny_wan, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE.md\n---\n")
    (base / "LICENSE.md").write_text("the terms")
    (base / "evaluation.json").write_text('{"rows": [{"name": "of the base"}]}')
    info = StudentInfo(str(base), "m", SIGMAS)
    directory = export_diffusers_directory(tmp_path / "student", make_tiny_transformer(5).state_dict(), info)
    assert (directory / "LICENSE.md").read_text() == "the terms"
    assert ModelCard.load(directory / "README.md").data.license == "mit"
    assert not (directory / "evaluation.json").exists()


NASTY = 'x"): {evil: [1]}\n---\n# `code` | <script>alert(1)</script> **bold** ```'


def test_what_users_write_stays_one_piece_of_text(tmp_path):
    base = base_with(tmp_path / "base", f"---\n{yaml.safe_dump({'license': 'other', 'license_name': NASTY})}---\n")
    training = {"data": [NASTY], "steps": 3, "method_options": {"prompt": NASTY}}
    info = StudentInfo("owner/base", NASTY, SIGMAS, training=training, call={"negative_prompt": NASTY})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/evaluation.json").write_text(json.dumps({"rows": [{"name": NASTY, NASTY: 1.0}]}))
    data, body = card_of(tmp_path, info, base, name=NASTY)
    assert data["license_name"] == NASTY and set(data) >= {"tags", "license", "library_name"} and "evil" not in data
    fence = re.search(r"```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert "negative_prompt" in fence.group(1)
    compile(fence.group(1), "snippet", "exec")
    outside = body[: fence.start()] + body[fence.end() :]
    # HTML is text everywhere, which is to say escaped or code.
    assert not re.search(r"(?<!\\)<script", re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside))
    cells = [line for line in outside.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in cells}) == 1
    assert [line for line in outside.splitlines() if line.startswith("# ")] == [outside.strip().splitlines()[0]]


def test_markdown_values():
    assert text("a_b *c*\n<d>") == r"a\_b \*c\* \<d\>"
    assert (
        code("plain") == "`plain`" and code("a`b") == "``a`b``" and code("`") == "`` ` ``" and code("a|b") == "`a\\|b`"
    )
    rows = [{"name": "a", "x": 0.123456, "parts": [1]}, {"name": "b", "x": None, "is_good": True}]
    assert table(rows).splitlines() == [
        "| name | x | is good |",
        "|---|---|---|",
        "| a | 0.1235 |  |",
        "| b |  | True |",
    ]


def test_an_export_tells_what_the_run_did(tmp_path):
    config = {
        "models": {},
        "callbacks": {"validation": {"output_dir": str(tmp_path / "videos")}},
        "method": {"_target_": "x.Method", "real_score_guidance_scale": 3.0, "teacher_path_cache": "/home/me/paths"},
        "training": {
            "seed": 7,
            "data": {"data_path": {"/home/me/clips": 2, "/mnt/more/films/": 1}},
            "loop": {"gradient_accumulation_steps": 2},
            "optimizer": {"_target_": "torch.optim.AdamW", "learning_rate": 2e-6},
        },
    }
    metadata = {"config": config, "step": 40, "updates": {"student": 8}, "global_batch_size": 16, "world_size": 4}
    record = json.loads(json.dumps(training_record(metadata)))
    _, body = card_of(tmp_path, StudentInfo("owner/base", "x.Method", SIGMAS, step=40, training=record))
    for row in ("data | `clips`, `films`", "steps | 40", "student 8", "clips per step | 16", "learning rate | 2e-06"):
        assert row in body
    assert "`real_score_guidance_scale: 3.0`" in body and "`teacher_path_cache: paths`" in body
    assert "/home/me" not in body + json.dumps(record)


def test_assets_are_of_the_exported_step(tmp_path):
    frames = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    for step in (2, 4):
        for index in range(6):
            (tmp_path / f"validation/step-{step:08d}").mkdir(parents=True, exist_ok=True)
            write_video(tmp_path / f"validation/step-{step:08d}/{index:03d}_{step}-steps.gif", frames, fps=4)
    (tmp_path / "validation/step-notes").mkdir()
    lines = [
        {"step": step, "loss/student": 1 / step, "loss/student/low": 3.0, "lr/student": 1.0} for step in range(1, 5)
    ]
    lines[1]["loss/student"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    assert read_losses(tmp_path / "metrics.jsonl", last_step=3) == {"student": [(1, 1.0), (3, 1 / 3)]}
    (tmp_path / "out").mkdir()
    copy_run_assets(RunFiles(tmp_path, tmp_path / "validation"), tmp_path / "out", step=3)
    names = sorted(path.name for path in (tmp_path / "out/assets").iterdir())
    assert names == [*(f"{index:03d}_2-steps.gif" for index in range(4)), "losses.png"]
    _, body = card_of(tmp_path, StudentInfo("owner/base", "m", SIGMAS, training={"steps": 3}))
    assert re.findall(r"\(assets/([^)]*)\)", body) == names


def test_a_chart_has_a_curve_for_each_role():
    colours = {(0, 114, 178), (213, 94, 0)}

    def pixels(losses):
        image = np.asarray(draw_losses(losses))[40:260, 90:700].reshape(-1, 3)
        return {colour: int((np.abs(image - np.array(colour)).sum(axis=1) < 60).sum()) for colour in colours}

    many = [(step, 1 + step % 7) for step in range(1, 3000)]
    assert all(count > 300 for count in pixels({"critic": many, "student": [(1, 2.0), (3000, 0.5)]}).values())
    # Constant, negative and single values have a place too.
    assert max(pixels({"student": [(1, -2.0), (2, -2.0)]}).values()) > 300
    draw_losses({"student": [(5, 0.0)]})


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', '{"rows": [1]}', '{"rows": [{}]}'])
def test_an_evaluation_that_is_none(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        read_evaluation(tmp_path / "evaluation.json")


def test_a_refreshed_card_keeps_what_was_written_by_hand(tmp_path):
    info = StudentInfo("owner/base", "m", SIGMAS)
    card_of(tmp_path, info)
    path = tmp_path / "out/README.md"
    path.write_text(path.read_text().replace("# student", "# My student\n\nIt is the best \\1 one."))
    (tmp_path / "out/results.json").write_text('{"rows": [{"name": "a\\\\1", "score": 2}]}')
    refresh_model_card(tmp_path / "out", info, name="me/student")
    refreshed = path.read_text()
    assert "# My student\n\nIt is the best \\1 one." in refreshed
    assert 'from_pretrained("me/student"' in refreshed and "| a\\\\1 | 2 |" in refreshed
    path.write_text("# all my own\n")
    refresh_model_card(tmp_path / "out", info, name="me/student")
    assert path.read_text() == "# all my own\n"


def test_the_kind_of_pipeline_is_read_from_the_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    data, _ = card_of(tmp_path, StudentInfo("owner/base", "m", SIGMAS, causal={"chunk_size": 1}))
    assert data["pipeline_tag"] == "image-to-video" and {"image-to-video", "causal"} <= set(data["tags"])


def test_a_loras_snippet_runs(tiny_wan, tmp_path, monkeypatch):
    transformer = make_tiny_transformer()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    directory, name = tmp_path / "my-lora", "pytorch_lora_weights.safetensors"
    WanPipeline.save_lora_weights(directory, transformer_lora_layers=get_peft_model_state_dict(transformer))
    few_step_scheduler(SIGMAS, sample_type="ode").save_pretrained(directory / "scheduler")
    shutil.copytree(tiny_wan, tmp_path / tiny_wan.name)
    info = StudentInfo(str(tiny_wan), "m", SIGMAS, "ode", call=CALL, lora_weights=name)
    write_model_card(directory / "README.md", info, name=directory.name)
    card = ModelCard.load(directory / "README.md")
    assert "lora" in card.data.tags
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.no_grad():
        exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1), names)
    assert (tmp_path / "sample.gif").is_file()
    assert names["pipe"].get_active_adapters() and names["pipe"].scheduler.sigmas.tolist() == pytest.approx(
        [1, 0.75, 0]
    )
