"""Whole evaluations, of tiny networks and of the digits teacher, through the function and the command."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fv_distill import cli
from fv_distill.data.digits import CAPTIONS
from fv_distill.evaluation import evaluate, page
from fv_distill.evaluation.clip_score import ClipScorer
from fv_distill.evaluation.pictures import contact_sheet, side_by_side

PROMPTS = ["a digit moving left", "the digit"]
DIGITS = Path(__file__).parents[2] / "examples/digits"
PAIRS = ("latent_mse", "latent_psnr", "latent_ssim", "pixel_mse", "psnr", "ssim")


@pytest.fixture(scope="module")
def report(tiny_wan, student, tmp_path_factory):
    """A student that has its teacher's weights, two prompts, two clips of each."""
    output = tmp_path_factory.mktemp("evaluation") / "new" / "report"
    options = {"num_clips": 2, "reference_steps": 4, "extra_steps": [2], "batch_size": 3, "fps": 8}
    return evaluate(student, tiny_wan, PROMPTS, output_dir=output, **options)


def test_rows_say_what_was_done(report):
    teacher, few, student = report.rows
    assert [row.name for row in report.rows] == ["teacher, 4 steps", "teacher, 2 steps", "student, 2 steps"]
    assert [row.forward_passes for row in report.rows] == [8, 4, 2]
    assert [row.guidance for row in report.rows] == [5.0, 5.0, 1.0]
    assert {row.clips for row in report.rows} == {4}
    assert teacher.same_noise is None and few.same_noise and student.same_noise
    assert all(getattr(teacher, name) is None for name in PAIRS)
    assert all(getattr(row, name) is not None for row in (few, student) for name in PAIRS)
    assert all(row.frechet_pixel is None for row in report.rows), "four clips are too few"
    assert all(row.seconds > row.seconds_per_clip > 0 and row.diversity > 0 for row in report.rows)
    assert report.floors == {"frechet_pixel": None, "frechet_motion": None}


def test_files(report):
    found = {path.relative_to(report.directory).as_posix() for path in report.directory.rglob("*") if path.is_file()}
    clips = {name for name in found if name.startswith("clips/")}
    assert found - clips == {
        *("evaluation.html", "evaluation.json", "evaluation.md", "contact_sheet.png"),
        *("videos/000_a-digit-moving-left.mp4", "videos/001_the-digit.mp4"),
    }
    ways = ("teacher-4-steps", "teacher-2-steps", "student-2-steps")
    files = ("settings.json", "000000.safetensors", "000003.safetensors")
    assert clips == {f"clips/{way}/{name}" for way in ways for name in files}
    results = json.loads((report.directory / "evaluation.json").read_text())
    assert results.keys() == {"rows", "floors", "settings", "versions"}
    assert results["rows"][2]["name"] == "student, 2 steps" and results["rows"][2]["psnr"] == report.rows[2].psnr
    assert results["settings"]["prompts"] == PROMPTS and results["settings"]["size"]["num_frames"] == 9
    text = (report.directory / "evaluation.md").read_text()
    assert "| student, 2 steps | 2 | 1 | 2 |" in text and "Frechet distances need 96 clips" in text


def test_clips_that_are_there_are_kept_and_missing_ones_are_made_again(report, student, tiny_wan, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(report.directory, output)
    paths = [output / f"clips/{way}/000003.safetensors" for way in ("teacher-4-steps", "student-2-steps")]
    kept, removed = paths
    before, stamp = load_file(removed), kept.stat().st_mtime_ns
    removed.unlink()
    options = {"num_clips": 2, "reference_steps": 4, "extra_steps": [2], "batch_size": 3}
    again = evaluate(student, tiny_wan, PROMPTS, output_dir=output, **options)
    after = load_file(removed)
    assert kept.stat().st_mtime_ns == stamp and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    same = [name for name in (*PAIRS, "motion", "flicker", "diversity")]
    assert all(
        getattr(a, name) == getattr(b, name) for a, b in zip(again.rows, report.rows, strict=True) for name in same
    )

    with pytest.raises(ValueError, match=r"other settings \(seed; seed was 0, is 1\)"):
        evaluate(student, tiny_wan, PROMPTS, output_dir=output, **options, seed=1)
    other = evaluate(student, tiny_wan, PROMPTS, output_dir=output, **options, seed=1, overwrite=True)
    assert other.rows[2].motion != report.rows[2].motion


def test_a_model_against_itself_is_no_distance_away(tiny_wan, tmp_path):
    options = {"num_inference_steps": 2, "reference_steps": 2, "num_frames": 5, "height": 16, "width": 16}
    itself = evaluate(tiny_wan, tiny_wan, PROMPTS[:1], output_dir=tmp_path, **options).rows[1]
    assert itself.same_noise and itself.latent_mse == itself.pixel_mse == 0
    assert itself.psnr == itself.latent_psnr == 100 and itself.ssim == pytest.approx(1)


def test_a_student_over_one_chunk_is_the_stock_network(student, one_chunk_student, tmp_path):
    evaluation = evaluate(one_chunk_student, student, PROMPTS, output_dir=tmp_path, reference_name="stock")
    stock, streamed = evaluation.rows
    assert [stock.name, streamed.name] == ["stock, 2 steps", "student, 2 steps"]
    assert streamed.same_noise and streamed.latent_mse < 1e-6 and streamed.psnr > 45


def test_a_streaming_student_shows_its_first_frames_early(tiny_wan, streaming_student, tmp_path):
    evaluation = evaluate(streaming_student, tiny_wan, PROMPTS[:1], output_dir=tmp_path, reference_steps=2)
    teacher, streamed = evaluation.rows
    assert streamed.latency_first_chunk_s < streamed.seconds_per_clip
    assert teacher.latency_first_chunk_s == teacher.seconds_per_clip
    assert streamed.forward_passes == 8 and streamed.same_noise and streamed.latent_mse > 1e-4


# Real clips


@pytest.fixture(scope="module")
def captioned_rows(tiny_rows, tmp_path_factory):
    """Three rows of one caption, one of another."""
    from fv_distill.data import write_rows
    from fv_distill.data.parquet import ParquetDataset

    dataset = ParquetDataset(tiny_rows)
    path = tmp_path_factory.mktemp("captioned") / "rows.parquet"
    write_rows(path, [{**dataset[index], "caption": PROMPTS[index == 3]} for index in range(4)])
    return path


def test_real_clips_are_compared_as_a_set(student, captioned_rows, tmp_path):
    from diffusers import AutoencoderKLWan

    from fv_distill.data.parquet import ParquetDataset

    evaluation = evaluate(student, captioned_rows, output_dir=tmp_path, num_clips=2)
    real, model = evaluation.rows
    assert (real.name, real.clips, real.forward_passes, real.seconds) == ("real clips", 3, None, None)
    assert model.clips == 4 and model.same_noise is None and model.psnr is None
    assert real.diversity > 0, "of the prompt that has two"
    stored = load_file(tmp_path / "clips/real-clips/000001.safetensors")["frames"]
    vae = AutoencoderKLWan.from_pretrained(student, subfolder="vae")
    with torch.no_grad():
        video = vae.decode(ParquetDataset(captioned_rows)[1]["vae_latent"][None], return_dict=False)[0]
    expected = ((video[0].clamp(-1, 1) / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert torch.equal(stored[0], expected)
    one = evaluate(student, captioned_rows, PROMPTS[1:], output_dir=tmp_path / "one", num_clips=2)
    assert [row.clips for row in one.rows] == [1, 2]


def test_real_clips_have_no_steps_and_their_own_captions(student, captioned_rows, tmp_path):
    with pytest.raises(ValueError, match="real clips have no steps"):
        evaluate(student, captioned_rows, output_dir=tmp_path, extra_steps=[4])
    with pytest.raises(ValueError, match="has the caption 'unknown'"):
        evaluate(student, captioned_rows, ["unknown"], output_dir=tmp_path)


# Figures of a network that has learned something


def test_the_digits_teacher_s_figures_make_sense(tmp_path):
    """Fewer steps are further away, in every distance; and a prompt's clips differ."""
    options = {"num_clips": 12, "batch_size": 96, "reference_guidance": 2.5, "guidance_scale": 2.5, "height": 16}
    options |= {"width": 16, "num_frames": 5, "reference_steps": 8, "num_inference_steps": 8, "negative_prompt": None}
    prompts = CAPTIONS[::5]
    evaluation = evaluate(
        DIGITS / "teacher", DIGITS / "teacher", prompts, output_dir=tmp_path, extra_steps=[4, 2], **options
    )
    teacher, four, two, itself = evaluation.rows
    assert itself.latent_mse == 0
    assert [itself.frechet_pixel, itself.frechet_motion] == pytest.approx([0, 0], abs=1e-6)
    for name in ("latent_mse", "pixel_mse", "frechet_pixel", "frechet_motion"):
        assert 0 < getattr(four, name) < getattr(two, name), name
    for name in ("latent_psnr", "latent_ssim", "psnr", "ssim"):
        assert getattr(four, name) > getattr(two, name), name
    assert [row.forward_passes for row in evaluation.rows] == [16, 8, 4, 16]
    assert 0.02 < teacher.motion < 0.2 and 0.1 < teacher.diversity < 0.5
    assert 0.03 < teacher.brightness < 0.15, "a digit covers a part of a black frame"
    assert "~" in (tmp_path / "evaluation.md").read_text(), "96 clips are few"


# The page and the pictures


def test_the_page_shows_all_and_needs_no_network(report):
    html = (report.directory / "evaluation.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html) and "http" not in html
    encoded = re.findall(r'src="data:video/mp4;base64,([^"]+)"', html)
    files = sorted((report.directory / "videos").iterdir())
    assert [base64.b64decode(text) for text in encoded] == [path.read_bytes() for path in files]
    assert html.count("<table>") == 3 and "prefers-color-scheme: dark" in html
    assert html.count('class="model"') == 3 and "student, 2 steps" in html


def test_the_page_escapes_text_and_links_what_is_too_much(report, tmp_path):
    (tmp_path / "videos").mkdir()
    videos = []
    for index, size in enumerate((300, 3000)):
        videos.append((f"<script>alert({index})</script>", tmp_path / f"videos/{index}.gif"))
        videos[-1][1].write_bytes(b"x" * size)
    Image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    path = tmp_path / "page.html"
    page.write_page(
        path,
        title="a <b> title",
        rows=report.rows,
        facts={"model": '"><img>'},
        notes=["<i>"],
        videos=videos,
        sheet=tmp_path / "sheet.png",
        settings={"prompts": ["</pre>"]},
        video_size=(148, 260),
        max_embedded_bytes=2000,
    )
    html = path.read_text()
    assert "<script" not in html and "<b>" not in html and "<img>" not in html and "<i>" not in html
    assert "&lt;script&gt;alert(1)" in html and html.count("</pre>") == 1
    assert 'src="data:image/gif;base64,' in html and 'src="videos/1.gif"' in html and "keep them beside" in html


def test_side_by_side_and_sheet():
    clips = {
        "one": np.full((3, 16, 16, 3), 10, dtype=np.uint8),
        "a longer clip of another size": np.full((5, 32, 24, 3), 200, dtype=np.uint8),
    }
    video = side_by_side(clips)
    assert video.shape == (5, 20 + 128, 2 * 128 + 4, 3)
    assert (video[:, 20:, :128] == 10).all() and (video[:, 20:, 132:] == 200).all()
    assert (video[:, :20] < 100).any(), "names are written"
    large = side_by_side({"one": np.zeros((1, 481, 961, 3), dtype=np.uint8)})
    assert large.shape == (1, 20 + 240, 480, 3)
    sheet = np.asarray(contact_sheet([("a prompt", clips), ("another", clips)]))
    assert (sheet == 10).all(axis=-1).sum() == 2 * 3 * 64 * 64


# The CLIP score


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    from tiny_models import WORDS, _tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(**sizes, vocab_size=len(WORDS) + 3, max_position_embeddings=64, eos_token_id=1)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    directory = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(directory)
    return directory


def test_the_clip_score_is_the_mean_cosine_of_its_frames(clip_directory):
    from transformers import AutoTokenizer, CLIPModel

    scorer = ClipScorer(clip_directory, device=torch.device("cpu"))
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    model, tokenizer = CLIPModel.from_pretrained(clip_directory), AutoTokenizer.from_pretrained(clip_directory)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    cosines = []
    for place in (0, 1, 2, 3, 5, 6, 7, 8):
        pixels = ((torch.from_numpy(frames[place]) / 255 - mean) / deviation).permute(2, 0, 1)[None]
        with torch.no_grad():
            out = model(**tokenizer(PROMPTS[:1], return_tensors="pt"), pixel_values=pixels)
        cosines.append(float((out.image_embeds * out.text_embeds).sum()))
    found = [scorer(frames, PROMPTS[0])]
    # The text that means the opposite: of the two scores, at least one is not cut off at 0.
    scorer._model.text_projection.weight.data.neg_()
    found.append(scorer(frames, PROMPTS[0]))
    expected = [100 * float(np.clip(np.multiply(sign, cosines), 0, None).mean()) for sign in (1, -1)]
    assert found == pytest.approx(expected, abs=1e-3) and max(expected) > 1


def test_a_scorer_that_is_not_there_stops_before_sampling(student, tiny_wan, tmp_path):
    with pytest.raises(FileNotFoundError, match="clip_score='nowhere/at-all'"):
        evaluate(student, tiny_wan, PROMPTS, output_dir=tmp_path, clip_score="nowhere/at-all")
    assert not list(tmp_path.iterdir())


# The command


def test_the_command(student, tiny_wan, clip_directory, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a digit\nthe digit\na bad digit\n")
    words = ["--model", str(student), "--reference", str(tiny_wan), "--prompts", str(tmp_path / "prompts.txt")]
    words += ["--max-prompts", "2", "--reference-steps", "2", "--reference-guidance", "1", "--num-frames", "5"]
    words += ["--clip-score", str(clip_directory), "--output", str(tmp_path / "out"), "--num-videos", "1"]
    words += ["--model-name", "ours", "--negative-prompt", "bad", "--dtype", "float32", "--device", "cpu"]
    cli.main(["evaluate", *words])
    printed = capsys.readouterr().out
    assert "ours, 2 steps: 2 clips in" in printed and f"wrote {tmp_path}/out/evaluation.html" in printed.replace(
        "\n", ""
    )
    results = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["teacher, 2 steps", "ours, 2 steps"]
    assert all(row["clip_score"] >= 0 and row["diversity"] is None for row in results["rows"])
    assert results["settings"]["size"] == {"num_frames": 5, "height": 32, "width": 32, "max_sequence_length": 8}
    assert len(list((tmp_path / "out/videos").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere", "--reference", "{wan}", "--prompts", "a"], "model='nowhere'"),
        (["--model", "{wan}", "--reference", "nowhere", "--prompts", "a"], "reference='nowhere'"),
        (["--model", "{wan}", "--reference", "{wan}"], "there are no prompts"),
        (["--model", "{wan}", "--reference", "{wan}", "--prompts", "a", " "], "a prompt is empty"),
        (["--model", "{wan}", "--reference", "{wan}", "--prompts", "none.txt"], "prompts='none.txt': no such file"),
        (["--model", "{wan}", "--reference", "{wan}", "--prompts", "a", "--num-clips", "0"], "num_clips=0 must be"),
        (["--model", "{wan}", "--reference", "{wan}", "--prompts", "a", "--fps", "0"], "fps=0 positive"),
        (["--model", "{wan}", "--reference", "{wan}", "--prompts", "a", "--dtype", "int8"], "dtype='int8'"),
        (
            ["--model", "{wan}", "--reference", "{wan}", "--prompts", "a", "--model-name", "teacher"],
            "two rows would be called 'teacher, 50 steps'",
        ),
    ],
)
def test_the_command_names_mistakes(tiny_wan, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", *(word.format(wan=tiny_wan) for word in words), "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()
