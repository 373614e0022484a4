"""A causal student from training to video: export, streaming, decoding as it goes, the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from tiny_runs import causal_kd_config, checkpoint, dfsft_config, self_forcing_config, train

from fv_distill import cli
from fv_distill.export import load_role_weights
from fv_distill.generation import VideoStreamer
from fv_distill.models import CausalWanModel
from fv_distill.models.wan_streaming_decode import WanStreamingDecoder
from fv_distill.rng import generator_for
from fv_distill.rollouts import autoregressive_rollout

PROMPT = "a digit moving left"


@pytest.fixture(scope="module")
def run(tiny_wan, tiny_rows, tmp_path_factory):
    """A Self-Forcing run with a window, and its export."""
    folder = tmp_path_factory.mktemp("causal")
    config = self_forcing_config(tiny_wan, tiny_rows, folder / "run")
    config["models"]["student"] |= {"local_window": 2, "sink_frames": 1}
    config["method"] |= {"context_noise": 0.1, "student_sample_type": "sde"}
    train(config, {"pipeline.export_dir": str(folder / "student"), "training.loop.max_train_steps": 2})
    return folder


@pytest.fixture(scope="module")
def export(run):
    return run / "student"


@pytest.fixture(scope="module")
def streamer(export):
    return VideoStreamer.from_pretrained(export, device="cpu")


def test_a_clip_decoded_in_pieces_is_the_clip_decoded_at_once(tiny_wan):
    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae")
    latents = torch.randn(2, 4, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.decode(latents, return_dict=False)[0]
    for sizes in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        decoder = WanStreamingDecoder(vae)
        pieces = [decoder(part) for part in latents.split(sizes, dim=2)]
        assert [piece.shape[2] for piece in pieces] == [4 * size - 3 * (index == 0) for index, size in enumerate(sizes)]
        torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-5, rtol=0)


def test_a_vae_that_keeps_its_state_elsewhere_is_refused():
    with pytest.raises(RuntimeError, match="keeps AutoencoderKLWan's decoding state elsewhere"):
        WanStreamingDecoder(torch.nn.Identity())


def test_an_export_says_how_it_streams_and_loads_into_the_stock_network(run, export):
    info = json.loads((export / "fv_distill.json").read_text())
    assert info["causal"] == {
        "adapter": "fv_distill.models.wan_causal.CausalWanModel",
        "chunk_size": 1,
        "local_window": 2,
        "sink_frames": 1,
        "context_noise": 0.1,
    }
    stock = WanTransformer3DModel.from_pretrained(export, subfolder="transformer")
    trained = load_role_weights(checkpoint(run / "run", 2), "ema")
    assert stock.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in stock.state_dict().items())
    assert type(DiffusionPipeline.from_pretrained(export).transformer) is WanTransformer3DModel
    assert "VideoStreamer" in (export / "README.md").read_text()


def test_streamed_latents_are_the_trainer_s_own_rollout(export, streamer):
    """The same noise through the rollout that Self-Forcing trains with."""
    shape = (4, 6, 4, 4)
    streamed = torch.cat(list(streamer.stream_latents(PROMPT, shape, seed=3)), dim=2)
    model = CausalWanModel.from_pretrained(str(export), chunk_size=1, local_window=2, sink_frames=1, text_length=8)

    def noise(*parts):
        return torch.randn(1, 4, 1, 4, 4, generator=generator_for(3, "generate", *parts))

    with torch.no_grad():
        rollout = autoregressive_rollout(
            model,
            torch.cat([noise("start", chunk) for chunk in range(6)], dim=2),
            model.encode_prompts([PROMPT]),
            (1.0, 0.75),
            exit_steps=[1] * 6,
            sample_type="sde",
            fresh_noise=lambda chunk, step: noise("fresh", chunk, step),
            context_noise=0.1,
            context_fresh_noise=lambda chunk: noise("context", chunk),
        )
    torch.testing.assert_close(streamed, rollout.x0, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_frames", [None, 1, 5, 14, 33])
def test_stream_and_generate_give_the_same_frames_and_as_many_as_asked_for(streamer, num_frames):
    parts = list(streamer.stream(PROMPT, num_frames=num_frames))
    whole = streamer.generate(PROMPT, num_frames=num_frames)
    assert whole.dtype == np.uint8 and whole.shape == (num_frames or 9, 32, 32, 3)
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(parts) == 1 + -(-((num_frames or 9) - 1) // 4)


def test_a_longer_video_begins_like_a_shorter_one(streamer):
    short, long = (streamer.generate(PROMPT, num_frames=count) for count in (9, 25))
    assert np.array_equal(long[:9], short)
    assert not np.array_equal(streamer.generate(PROMPT, num_frames=9, seed=1), short)


def test_noise_that_is_given_starts_the_first_chunks(streamer):
    shape = (4, 4, 4, 4)
    starts = [torch.randn(1, 4, 1, 4, 4, generator=generator_for(3, "generate", "start", chunk)) for chunk in range(4)]
    own = torch.cat(list(streamer.stream_latents(PROMPT, shape, seed=3)), dim=2)
    given = torch.cat(list(streamer.stream_latents(PROMPT, shape, seed=3, noise=torch.cat(starts[:2], dim=2))), dim=2)
    assert torch.equal(given, own), "its own noise, given for the first half"
    other = torch.cat(list(streamer.stream_latents(PROMPT, shape, seed=3, noise=-starts[0])), dim=2)
    assert not torch.equal(other[:, :, 0], own[:, :, 0])
    noise = torch.cat(starts[:3], dim=2)
    assert np.array_equal(
        streamer.generate(PROMPT, num_frames=9, seed=3, noise=noise), streamer.generate(PROMPT, seed=3)
    )
    for wrong in ((1, 4, 5, 4, 4), (1, 3, 1, 4, 4), (4, 1, 4, 4), (2, 4, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"noise has shape .* must be \[1, 4, t, 4, 4\]"):
            next(streamer.stream_latents(PROMPT, shape, noise=torch.zeros(wrong)))


def test_with_a_window_the_cache_does_not_grow(streamer):
    sizes = [streamer.model.new_cache(1, (4, count, 4, 4), rolling=True).memory_bytes() for count in (6, 60)]
    assert sizes[0] == sizes[1]


def test_a_causal_model_of_many_steps_streams_too(tiny_wan, tiny_rows, tmp_path):
    train(dfsft_config(tiny_wan, tiny_rows, tmp_path / "run"), {"pipeline.export_dir": str(tmp_path / "model")})
    streamer = VideoStreamer.from_pretrained(tmp_path / "model", num_inference_steps=3)
    assert streamer.sigmas == pytest.approx((1.0, 6 / 7, 0.6)) and streamer.sample_type == "ode"
    assert streamer.guidance_scale == 5.0, "as WanPipeline has it"
    guided, unguided = (streamer.generate(PROMPT, guidance_scale=scale) for scale in (None, 1.0))
    assert guided.shape == (9, 32, 32, 3) and not np.array_equal(guided, unguided)
    # The pass that guidance adds is the network's own on another text, over a history of its own.
    assert np.array_equal(streamer.generate(PROMPT, guidance_scale=0.0), streamer.generate("", guidance_scale=1.0))
    same = streamer.generate(PROMPT, guidance_scale=3.0, negative_prompt=PROMPT)
    assert np.abs(same.astype(int) - unguided).max() <= 1


def test_a_causal_student_needs_no_stock_scheduler(tiny_wan, tiny_rows, tmp_path):
    """It streams, so levels that FlowMatchEulerDiscreteScheduler can't visit are as good as others."""
    config = causal_kd_config(tiny_wan, tiny_rows, tmp_path / "run")
    config["method"]["t_list"] = [999, 937, 833, 624, 0]
    train(config, {"pipeline.export_dir": str(tmp_path / "student"), "training.loop.max_train_steps": 1})
    streamer = VideoStreamer.from_pretrained(tmp_path / "student")
    assert streamer.sigmas == (1.0, 0.937, 0.833, 0.624) and streamer.guidance_scale == 1.0
    assert streamer.generate(PROMPT).shape == (9, 32, 32, 3)


def test_mistakes_are_named(tiny_wan, export, streamer):
    with pytest.raises(ValueError, match="no export of a causal student"):
        VideoStreamer.from_pretrained(tiny_wan)
    with pytest.raises(ValueError, match="num_inference_steps=7, but .* was distilled to 2 steps"):
        VideoStreamer.from_pretrained(export, num_inference_steps=7)
    with pytest.raises(ValueError, match="height=20 must be a multiple of 8"):
        next(streamer.stream(PROMPT, height=20))
    with pytest.raises(ValueError, match="num_frames=0 must be at least 1"):
        next(streamer.stream(PROMPT, num_frames=0))


def test_an_export_from_elsewhere_does_not_choose_what_is_imported(export, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    info = json.loads((copy / "fv_distill.json").read_text())
    info["causal"]["adapter"] = "os.system"
    (copy / "fv_distill.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"names the adapter 'os.system'"):
        VideoStreamer.from_pretrained(copy)


# The command


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_the_command_streams_a_video(export, streamer, tmp_path, capsys, suffix):
    import av

    words = ["--model", str(export), "--prompt", PROMPT, "--num-frames", "14", "--stream", "--fps", "8"]
    cli.main(["generate", *words, "--output", str(tmp_path / f"new/out{suffix}")])
    printed = capsys.readouterr().out
    assert "chunk 1: 1 frames" in printed and "chunk 5: 1 frames" in printed and "14 frames, " in printed
    assert "frames/s, first chunk after" in printed
    with av.open(str(tmp_path / f"new/out{suffix}")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 14 and frames[0].shape == (64, 64, 3)
    if suffix == ".mp4":
        expected = streamer.generate(PROMPT, num_frames=14).repeat(2, 1).repeat(2, 2)
        assert np.abs(np.stack(frames).astype(float) - expected).mean() < 12


def test_the_command_samples_a_bidirectional_model_at_once(tiny_wan, tmp_path, capsys):
    words = ["--model", str(tiny_wan), "--prompt", PROMPT, "--num-frames", "5", "--num-inference-steps", "2"]
    words += ["--height", "32", "--width", "32", "--output", str(tmp_path / "out.gif")]
    words += ["--guidance-scale", "2", "--negative-prompt", "bad"]
    cli.main(["generate", *words])
    assert "5 frames" in capsys.readouterr().out and (tmp_path / "out.gif").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "--model='nowhere'"),
        (["--model", "{wan}", "--stream"], "is no causal student's export"),
        (["--model", "{export}", "--output", "out.avi"], "written as .mp4 or .gif"),
        (["--model", "{export}", "--fps", "0"], "--fps 0 must be positive"),
    ],
)
def test_the_command_names_mistakes(tiny_wan, export, capsys, words, message):
    words = [word.format(wan=tiny_wan, export=export) for word in words]
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "--prompt", PROMPT, *words])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and message in captured.err and "Traceback" not in captured.err


def test_the_command_runs_as_a_process(export, tmp_path):
    words = ["generate", "--model", str(export), "--prompt", PROMPT, "--output", str(tmp_path / "out.gif")]
    subprocess.run([sys.executable, "-m", "fv_distill", *words], check=True, capture_output=True)
    assert (tmp_path / "out.gif").read_bytes().startswith(b"GIF89a")
