"""Clips of pipelines and streams: the noise they start from, the calls that are counted, what resumes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fv_distill.evaluation.clips import Batch, Clip, ClipStore, Cost, same_settings
from fv_distill.evaluation.counting import fingerprint, watch_calls
from fv_distill.evaluation.sampling import PipelineSampler, StreamSampler, start_generator
from fv_distill.evaluation.ways import (
    ClipSize,
    Way,
    call_of_frames,
    extra_ways,
    frames_of_call,
    make_way,
    resolve_size,
    weights_fingerprint,
)

PROMPTS = ["a digit moving left", "the digit"]
SIZE = ClipSize(9, 32, 32, 8)
OPTIONS = {"seed": 5, "negative_prompt": None, "device": torch.device("cpu"), "dtype": torch.float32}


def way_of(directory, **options):
    return make_way("model", directory, **{"steps": None, "guidance": None, "option": "steps", **options})


def test_a_pipeline_is_called_as_anyone_calls_it(tiny_wan):
    way = way_of(tiny_wan, steps=2, guidance=3.0)
    batch = PipelineSampler(way, SIZE, **OPTIONS).sample(PROMPTS, [4, 7])
    noise = torch.cat([torch.randn(1, 4, 3, 4, 4, generator=start_generator(5, index)) for index in (4, 7)])
    pipeline = DiffusionPipeline.from_pretrained(tiny_wan)
    call = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}
    call |= {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": noise}
    frames = pipeline(PROMPTS, output_type="np", **call).frames
    latents = pipeline(PROMPTS, output_type="latent", **call).frames
    assert np.array_equal(np.stack([clip.frames for clip in batch.clips]), (frames * 255).round().astype(np.uint8))
    torch.testing.assert_close(torch.stack([clip.latents for clip in batch.clips]), latents)
    assert [clip.noise for clip in batch.clips] == [fingerprint(row) for row in noise]
    assert batch.cost.forward_passes == 4, "two steps, with and without the prompt"
    assert 0 < batch.cost.first_frames_seconds == batch.cost.seconds


def test_a_clip_does_not_depend_on_its_batch_and_the_global_generator_is_left_alone(student):
    sampler = PipelineSampler(way_of(student), SIZE, **OPTIONS)
    together = sampler.sample(PROMPTS, [0, 1])
    state = torch.get_rng_state()
    alone = sampler.sample(PROMPTS[1:], [1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(together.clips[1].latents, alone.clips[0].latents, atol=1e-5, rtol=1e-4)
    assert together.clips[1].noise == alone.clips[0].noise != together.clips[0].noise
    assert together.cost.forward_passes == alone.cost.forward_passes == 2


def test_fresh_noise_is_the_same_each_time(noisy_student):
    sampler = PipelineSampler(way_of(noisy_student), SIZE, **OPTIONS)
    first = sampler.sample(PROMPTS, [0, 1])
    torch.rand(3)  # whatever else draws from the global generator
    again, other = sampler.sample(PROMPTS, [0, 1]), sampler.sample(PROMPTS, [2, 3])
    assert torch.equal(first.clips[0].latents, again.clips[0].latents)
    assert not torch.equal(first.clips[0].latents, other.clips[0].latents)


def test_a_stream_starts_from_the_pipeline_s_noise(student, one_chunk_student):
    """A causal network over one chunk is the stock network, so the same noise must give the same clip."""
    streamed = StreamSampler(way_of(one_chunk_student), SIZE, **OPTIONS).sample(PROMPTS, [4, 7])
    sampled = PipelineSampler(way_of(student), SIZE, **OPTIONS).sample(PROMPTS, [4, 7])
    for one, other in zip(streamed.clips, sampled.clips, strict=True):
        assert one.noise == other.noise
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=1e-3)
        assert np.abs(one.frames.astype(int) - other.frames).max() <= 1
    assert streamed.cost.forward_passes == 2, "the only chunk need not be remembered"


def test_a_stream_gets_the_noise_chunk_by_chunk_and_counts_every_call(streaming_student, student):
    sampler = StreamSampler(way_of(streaming_student), SIZE, **OPTIONS)
    batch = sampler.sample(PROMPTS, [4, 7])
    assert batch.cost.forward_passes == 3 * 2 + 2, "three chunks of two steps, two of them stored"
    assert 0 < batch.cost.first_frames_seconds < batch.cost.seconds
    assert [clip.frames.shape for clip in batch.clips] == [(9, 32, 32, 3)] * 2
    sampled = PipelineSampler(way_of(student), SIZE, **OPTIONS).sample(PROMPTS, [4, 7])
    assert [clip.noise for clip in batch.clips] == [clip.noise for clip in sampled.clips]
    # The first chunk sees nothing else, so that a stock network of one frame makes it from the same noise.
    noise = torch.randn(1, 4, 3, 4, 4, generator=start_generator(5, 4))[:, :, :1]
    pipeline = DiffusionPipeline.from_pretrained(student)
    call = {"num_frames": 1, "height": 32, "width": 32, "max_sequence_length": 8, "guidance_scale": 1.0}
    first = pipeline(PROMPTS[0], num_inference_steps=2, latents=noise, output_type="latent", **call).frames
    torch.testing.assert_close(batch.clips[0].latents[:, :1], first[0], atol=1e-4, rtol=1e-3)


def test_frames_beyond_whole_chunks_are_cut_and_the_noise_stays_the_pipeline_s(one_chunk_student, student):
    size = ClipSize(13, 32, 32, 8)
    streamed = StreamSampler(way_of(one_chunk_student), size, **OPTIONS).sample(PROMPTS[:1], [0])
    sampled = PipelineSampler(way_of(student), size, **OPTIONS).sample(PROMPTS[:1], [0])
    for batch in (streamed, sampled):
        assert batch.clips[0].frames.shape == (13, 32, 32, 3) and batch.clips[0].latents.shape == (4, 4, 4, 4)
    assert streamed.clips[0].noise == sampled.clips[0].noise
    assert (
        len(PipelineSampler(way_of(student), ClipSize(6, 32, 32, 8), **OPTIONS).sample(["a"], [0]).clips[0].frames) == 6
    )


def test_rows_count_and_not_calls():
    """Pipelines differ in whether guidance is a second call or a second half of the batch."""
    network = nn.Linear(3, 3)
    with watch_calls([network], torch.device("cpu")) as seen:
        network(torch.zeros(2, 3))
        network(torch.ones(4, 3))
    network(torch.zeros(8, 3))
    assert seen.rows == 6 and torch.equal(torch.stack(seen.noise), torch.zeros(2, 3))


def test_fingerprints_tell_values_shapes_and_types_apart():
    noise = torch.randn(2, 6)
    others = [noise + 1e-6, noise.reshape(3, 4), noise.bfloat16(), noise[:1]]
    assert len({fingerprint(tensor) for tensor in [noise, *others]}) == 5
    assert fingerprint(noise.T.contiguous().T) == fingerprint(noise)


MEASURED = """
import numpy, torch
from fv_distill.evaluation.counting import PeakMemory
memory = PeakMemory(torch.device("cpu"))
memory.reset()
peaks = [memory.read()]
block = numpy.ones(256 * 2**20, dtype=numpy.uint8)
del block
peaks.append(memory.read())
memory.reset()
print(*peaks, memory.read())
"""


def test_memory_of_the_process_is_measured_from_the_reset_on():
    """Of a small process: of a large one the system may page something out meanwhile."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    if "None" in done.stdout:
        pytest.skip("this kernel does not reset the peak")
    before, most, after = map(int, done.stdout.split())
    assert most > before + 200 * 2**20 and after < before + 50 * 2**20


def test_even_steps_replace_a_scheduler_that_shifts_twice(tiny_wan):
    (way,) = extra_ways("teacher", way_of(tiny_wan, steps=50), [4])
    sampler = PipelineSampler(way, SIZE, **OPTIONS)
    own = sampler.pipeline.scheduler
    visited = []
    with_hook = sampler.pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: visited.append(round(float(kwargs["timestep"][0]), 2)), with_kwargs=True
    )
    sampler.sample(PROMPTS[:1], [0])
    with_hook.remove()
    assert visited[::2] == [1000, 900, 750, 500] and sampler.pipeline.scheduler is own


def test_ways(tiny_wan, student, streaming_student):
    way = way_of(tiny_wan)
    assert way == Way("model, 50 steps", tiny_wan, 50, 5.0, "pipeline"), "WanPipeline's own defaults"
    assert way_of(student) == Way("model, 2 steps", student, 2, 1.0, "pipeline")
    assert way_of(streaming_student).kind == "stream" and way_of(student, guidance=2.0).guidance == 2.0
    assert way_of(tiny_wan, steps=1).name == "model, 1 step"
    extra = extra_ways("teacher", way_of(tiny_wan, steps=8, guidance=2.0), [4, 8, 2, 4])
    assert [(way.name, way.steps, way.guidance) for way in extra] == [
        ("teacher, 4 steps", 4, 2.0),
        ("teacher, 2 steps", 2, 2.0),
    ]
    with pytest.raises(ValueError, match="steps=3, but .* was distilled to 2 steps"):
        way_of(student, steps=3)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        way_of(tiny_wan, steps=0)
    with pytest.raises(ValueError, match="--extra-steps, but .* was distilled to 2 steps"):
        extra_ways("teacher", way_of(student), [1])


def test_sizes(tiny_wan, student):
    assert resolve_size(ClipSize(), [tiny_wan]) == ClipSize()
    assert resolve_size(ClipSize(), [tiny_wan, student]) == SIZE
    assert resolve_size(ClipSize(5, width=16), [student]) == ClipSize(5, 32, 16, 8)
    with pytest.raises(ValueError, match="height=0 must be at least 1"):
        resolve_size(ClipSize(height=0), [])
    assert [call_of_frames(tiny_wan, frames) for frames in (1, 5, 6, 9)] == [1, 5, 9, 9]
    assert [frames_of_call(tiny_wan, frames) for frames in (1, 5, 9)] == [1, 5, 9]


def test_a_pipeline_without_videos_is_refused(tiny_wan):
    class StillPipeline:
        scheduler = None

        def __call__(self, prompt):
            """No frames."""

    with pytest.raises(ValueError, match="StillPipeline, which makes no videos"):
        PipelineSampler(way_of(tiny_wan), SIZE, pipeline=StillPipeline(), **OPTIONS)


# Clips on disk


def make_batch(seed: int, *, latents: bool = True, cost: Cost | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(256, (2, 3, 4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    tensors = torch.randn(2, 4, 3, 2, 2, generator=generator) if latents else [None, None]
    return Batch([Clip(*row) for row in zip(frames, tensors, ["a", None], strict=True)], cost)


@pytest.mark.parametrize("latents", [True, False])
def test_batches_are_kept(tmp_path, latents):
    store = ClipStore(tmp_path / "clips", {"seed": 1, "prompts": ("a", "b")})
    costs = Cost(4.0, 1.5, 0.5, None), None
    batches = {first: make_batch(first, latents=latents, cost=cost) for first, cost in zip((0, 2), costs, strict=True)}
    for first in (2, 0):
        assert not store.has(first)
        store.save(first, batches[first])
        assert store.has(first)
    again = ClipStore(tmp_path / "clips", {"seed": 1, "prompts": ("a", "b")})
    found = list(again)
    assert [batch.cost for batch in again.batches()] == list(costs)
    expected = [clip for first in (0, 2) for clip in batches[first].clips]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.frames, other.frames) and one.noise == other.noise
        assert one.latents is None if not latents else torch.equal(one.latents, other.latents)
    assert not list(tmp_path.rglob("*.partial"))


def test_other_settings_are_refused(tmp_path):
    ClipStore(tmp_path, {"seed": 1, "way": {"steps": 4}})
    assert same_settings(tmp_path, {"seed": 1, "way": {"steps": 4}}) and same_settings(tmp_path / "new", {"seed": 2})
    message = r"other settings \(seed, way; seed was 1, is 2\); give another --output, or --overwrite"
    with pytest.raises(ValueError, match=message):
        ClipStore(tmp_path, {"seed": 2, "way": {"steps": 8}})


def test_new_weights_under_an_old_name_are_noticed(student, tmp_path):
    import os
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(student, copy)
    before = weights_fingerprint(copy)
    assert any(name.endswith(".safetensors") for name in before) and before == weights_fingerprint(copy)
    os.utime(copy / "transformer/diffusion_pytorch_model.safetensors", ns=(1, 1))
    assert weights_fingerprint(copy) != before


def changed_info(student, copy, **changes):
    """The export with other words about itself."""
    shutil.copytree(student, copy)
    info = json.loads((copy / "fv_distill.json").read_text())
    info["call"] |= changes.pop("call", {})
    (copy / "fv_distill.json").write_text(json.dumps(info | changes))
    return copy


def test_a_student_is_called_with_what_it_was_exported_with(student, tmp_path):
    """Families have further guidances; without them the student would be another one."""
    call = {"attention_kwargs": {"scale": 0.5}, "num_frames": 33, "nothing_of_wan": 1}
    copy = changed_info(student, tmp_path / "copy", call=call)
    sampler = PipelineSampler(way_of(copy), SIZE, **OPTIONS)
    assert sampler._call["attention_kwargs"] == {"scale": 0.5} and sampler._call["num_frames"] == 9
    assert "nothing_of_wan" not in sampler._call


def test_models_that_read_no_text_are_refused(streaming_student, tmp_path):
    copy = changed_info(streaming_student, tmp_path / "copy", reads_text=False)
    with pytest.raises(ValueError, match="makes videos of images and actions"):
        way_of(copy)
