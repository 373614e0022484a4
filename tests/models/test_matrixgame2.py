"""The adapters: what the network is given, what is refused, and chunks against whole clips."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_matrixgame2 import (
    CHANNELS,
    FLOW_SHIFT,
    IMAGE_DIM,
    IMAGE_TOKENS,
    KEYS,
    LATENT_SHAPE,
    conditions,
    make_directory,
)

from fv_distill.methods import DMD2Method, SelfForcingMethod
from fv_distill.methods.options import CfgUncondOptions, DMD2Options, SelfForcingOptions
from fv_distill.models import CausalMatrixGame2Model, Conditioning, MatrixGame2Model
from fv_distill.models.action_cache import ActionKVCache
from fv_distill.models.conditioning import UncondPolicy, unconditional
from fv_distill.rng import SampleRng
from fv_distill.schedules import flow

SIGMA = torch.tensor([0.3, 0.8])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("tiny") / "matrixgame2")


@pytest.fixture(scope="module")
def model(directory):
    return MatrixGame2Model.from_pretrained(str(directory))


def causal(directory, **options):
    return CausalMatrixGame2Model.from_pretrained(str(directory), **{"chunk_size": 2, **options})


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(frames=3, **changes):
    extras = {**conditions(2, latent_frames=frames), **changes}
    return Conditioning(None, None, {name: value for name, value in extras.items() if value is not None})


def batch(frames=3):
    shape = (CHANNELS, frames, 4, 4)
    return {
        "vae_latent": draw(2, 2, *shape),
        **conditions(2, latent_frames=frames),
        "caption": ["", ""],
        "caption_dropped": torch.zeros(2, dtype=torch.bool),
        "sample_index": [0, 1],
        "num_bad_rows": 0,
    }


class Recorder:
    """Stands before a network and keeps what it is called with."""

    def __init__(self, model, monkeypatch):
        self.calls = []
        forward = model.transformer.forward

        def recorded(**kwargs):
            self.calls.append(kwargs)
            return forward(**kwargs)

        monkeypatch.setattr(model.transformer, "forward", recorded)


@torch.no_grad()
def test_the_network_is_called_as_published(model, monkeypatch):
    recorder, x_t, given = Recorder(model, monkeypatch), draw(1, 2, *LATENT_SHAPE), conditioning()
    velocity = model.predict_velocity(x_t, SIGMA, given)
    (call,) = recorder.calls
    # cond_concat of the published inference: 4 channels that are 1 in the first latent frame, then the image's latents.
    mask = torch.zeros(2, 4, 3, 4, 4)
    mask[:, :, 0] = 1
    expected = torch.cat([x_t, mask, given.extras["first_frame_latent"]], dim=1)
    torch.testing.assert_close(call["hidden_states"], expected, atol=0, rtol=0)
    torch.testing.assert_close(call["timestep"], torch.tensor([300.0, 800.0]))
    assert call["mouse_cond"] is given.extras["mouse_cond"] and call["keyboard_cond"] is given.extras["keyboard_cond"]
    # x0 = x_t - sigma * output is how the published wrapper reads the output.
    output = model.transformer(**call)[0]
    torch.testing.assert_close(velocity, output, atol=0, rtol=0)
    x0 = model.predict_x0(x_t, SIGMA, given)
    torch.testing.assert_close(x0, x_t - SIGMA.view(2, 1, 1, 1, 1) * output, atol=1e-6, rtol=0)


@torch.no_grad()
def test_dropped_channels_are_not_there(model, monkeypatch):
    recorder, x_t = Recorder(model, monkeypatch), draw(1, 2, *LATENT_SHAPE)
    policy = UncondPolicy(text="drop", image="drop", action="drop")
    model.predict_velocity(x_t, SIGMA, unconditional(conditioning(), policy, None))
    (call,) = recorder.calls
    assert call["encoder_hidden_states_image"] is None and call["mouse_cond"] is None and call["keyboard_cond"] is None
    assert (call["hidden_states"][:, CHANNELS:] == 0).all()


def test_flow_shift_and_batches_without_text(model):
    assert model.flow_shift == FLOW_SHIFT
    assert model.required_channels == () and not model.reads_text
    prepared = model.prepare_batch(batch())
    assert prepared.conditioning.text is None
    assert set(prepared.conditioning.extras) == {"first_frame_latent", "clip_feature", "mouse_cond", "keyboard_cond"}
    torch.testing.assert_close(model.raw_latents(prepared.latents), batch()["vae_latent"])
    zeros = model.prepare_batch(batch(), latents_source="zeros").latents
    assert zeros.shape == prepared.latents.shape and not zeros.any()
    assert model.prompt_conditioning("anything").text is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keyboard_cond": None}, "have no keyboard_cond, which MatrixGame2Model"),
        ({"first_frame_latent": None}, "have no first_frame_latent"),
        ({"mouse_cond": torch.zeros(2, 8, 2)}, r"mouse_cond has the shape \(8, 2\), but .* needs \(9, 2\)"),
        ({"keyboard_cond": torch.zeros(2, 9, 7)}, r"keyboard_cond has the shape \(9, 7\), but .* needs \(9, 3\)"),
        ({"clip_feature": torch.zeros(2, 4, IMAGE_DIM)}, r"clip_feature has the shape \(4, 8\), but .* needs \(5, 8\)"),
        ({"vae_latent": torch.zeros(2, 5, 3, 4, 4)}, "5 channels but"),
        ({"vae_latent": torch.zeros(2, CHANNELS, 3, 5, 4)}, "H=5 does not divide by the patch size 2"),
    ],
)
def test_batches_that_do_not_fit(model, changes, message):
    changed = {name: value for name, value in {**batch(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        model.prepare_batch(changed)


def test_actions_beyond_the_clip_are_allowed(model):
    longer = {**batch(), "mouse_cond": torch.zeros(2, 20, 2), "keyboard_cond": torch.zeros(2, 20, KEYS)}
    assert model.prepare_batch(longer).conditioning.extras["mouse_cond"].shape == (2, 20, 2)


def test_a_network_without_mouse_needs_none(tmp_path):
    model = MatrixGame2Model.from_pretrained(str(make_directory(tmp_path, enable_mouse=False)))
    without = {name: value for name, value in batch().items() if name != "mouse_cond"}
    assert "mouse_cond" not in model.condition_shapes(LATENT_SHAPE)
    with torch.no_grad():
        prepared = model.prepare_batch(without)
        assert model.predict_velocity(prepared.latents, SIGMA, prepared.conditioning).isfinite().all()


def test_another_network_is_refused(tmp_path):
    directory = make_directory(tmp_path)
    config = directory / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 12', '"in_channels": 8'))
    with torch.device("meta"), pytest.raises(ValueError, match="8 input channels, which are not 4 noisy ones"):
        MatrixGame2Model.from_pretrained(str(directory))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"local_window": 2, "sink_frames": 1}, {"chunk_size": 3}])
def test_streaming_equals_the_pass_over_clean_history(directory, options):
    model, given = causal(directory, **options), conditioning(6)
    clean, x_t = draw(3, 2, CHANNELS, 6, 4, 4), draw(4, 2, CHANNELS, 6, 4, 4)
    expected = model.predict_velocity(x_t, SIGMA, given, clean_history=clean)
    cache = model.new_cache(2, x_t.shape[1:])
    parts = []
    for start in range(0, 6, model.chunk_size):
        chunk = slice(start, start + model.chunk_size)
        call = {"cache": cache, "start_frame": start}
        parts.append(model.predict_velocity_streaming(x_t[:, :, chunk], SIGMA, given, **call))
        model.predict_velocity_streaming(clean[:, :, chunk], torch.zeros(2), given, **call, store_kv=True)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=0)
    assert (expected - model.predict_velocity(x_t, SIGMA, given)).abs().max() > 1e-3


@torch.no_grad()
def test_one_chunk_equals_the_bidirectional_model(directory, model):
    x_t, given = draw(4, 2, *LATENT_SHAPE), conditioning()
    one = causal(directory, chunk_size=3)
    expected = model.predict_velocity(x_t, SIGMA, given)
    torch.testing.assert_close(one.predict_velocity(x_t, SIGMA, given), expected, atol=1e-5, rtol=0)
    streamed = one.predict_velocity_streaming(x_t, SIGMA, given, cache=one.new_cache(2, LATENT_SHAPE), start_frame=0)
    torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=0)
    one_by_one = causal(directory, chunk_size=1)
    assert (one_by_one.predict_velocity(x_t, SIGMA, given) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_each_frame_may_have_a_noise_level_of_its_own(model):
    x_t, given = draw(4, 2, *LATENT_SHAPE), conditioning()
    expected = model.predict_velocity(x_t, SIGMA, given)
    per_frame = SIGMA[:, None].expand(-1, 3)
    torch.testing.assert_close(model.predict_velocity(x_t, per_frame, given), expected, atol=1e-5, rtol=0)
    other = torch.cat([per_frame[:, :2], per_frame[:, 2:] / 2], dim=1)
    assert (model.predict_velocity(x_t, other, given) - expected).abs().max() > 1e-3


def test_a_cache_tells_its_size_before_it_is_made(directory):
    model = causal(directory, local_window=2, sink_frames=1)
    shape = (CHANNELS, 8, 4, 4)
    for rolling, frames in ((False, 8), (True, 5)):
        cache = model.new_cache(2, shape, rolling=rolling)
        assert isinstance(cache, ActionKVCache)
        sizes = model.cache_sizes(2, shape, rolling=rolling)
        assert ActionKVCache.required_bytes(**sizes) == cache.memory_bytes()
        assert [part.capacity_frames for part in cache.parts] == [frames] * 3
        assert cache.mouse is not None and cache.mouse.entries.shape[2] == 2 * 4
    with pytest.raises(ValueError, match="local_window is null"):
        causal(directory).new_cache(2, shape, rolling=True)


@torch.no_grad()
def test_a_reset_cache_serves_another_clip(directory):
    model, given = causal(directory), conditioning(4)
    x_t = draw(3, 2, CHANNELS, 4, 4, 4)
    cache = model.new_cache(2, x_t.shape[1:])

    def second_chunk():
        model.predict_velocity_streaming(
            x_t[:, :, :2], torch.zeros(2), given, cache=cache, start_frame=0, store_kv=True
        )
        return model.predict_velocity_streaming(x_t[:, :, 2:], SIGMA, given, cache=cache, start_frame=2)

    first = second_chunk()
    assert [part.num_frames for part in cache.parts] == [2, 2, 2]
    cache.reset()
    assert [part.num_frames for part in cache.parts] == [0, 0, 0]
    with pytest.raises(ValueError, match="no complete history"):
        model.predict_velocity_streaming(x_t[:, :, 2:], SIGMA, given, cache=cache, start_frame=2)
    torch.testing.assert_close(second_chunk(), first, atol=0, rtol=0)


def test_another_image_drops_the_keys_kept_of_the_last_one(directory):
    model, x_t, given = causal(directory), draw(3, 2, CHANNELS, 4, 4, 4), conditioning(4)
    other = conditioning(4, clip_feature=draw(9, 2, IMAGE_TOKENS, IMAGE_DIM))
    cache = model.new_cache(2, x_t.shape[1:])
    with torch.no_grad():
        model.predict_velocity_streaming(
            x_t[:, :, :2], torch.zeros(2), given, cache=cache, start_frame=0, store_kv=True
        )
        actual = model.predict_velocity_streaming(x_t[:, :, 2:], SIGMA, other, cache=cache, start_frame=2)
    # With gradients nothing is kept.
    expected = model.predict_velocity_streaming(x_t[:, :, 2:], SIGMA, other, cache=cache, start_frame=2)
    torch.testing.assert_close(actual, expected.detach(), atol=1e-6, rtol=0)


def test_chunks_beyond_the_first_frames_latents(directory):
    model = causal(directory)
    cache = model.new_cache(2, (CHANNELS, 6, 4, 4))
    with pytest.raises(ValueError, match="first_frame_latent has 3 latent frames, but the clip goes on to frame 6"):
        model.predict_velocity_streaming(
            draw(1, 2, CHANNELS, 2, 4, 4), SIGMA, conditioning(3), cache=cache, start_frame=4
        )


@torch.no_grad()
def test_a_causal_student_on_the_teachers_network(directory, model):
    base = MatrixGame2Model.from_pretrained(str(directory))
    student = CausalMatrixGame2Model.on_base(base, chunk_size=1)
    student.add_lora("student", rank=2, target_modules="action")
    assert all("action_model" in name for name, p in base.transformer.named_parameters() if p.requires_grad)
    x_t, given = draw(4, 2, *LATENT_SHAPE), conditioning()
    expected = model.predict_velocity(x_t, SIGMA, given)
    torch.testing.assert_close(base.predict_velocity(x_t, SIGMA, given), expected, atol=1e-6, rtol=0)
    alone = causal(directory, chunk_size=1).predict_velocity(x_t, SIGMA, given)
    torch.testing.assert_close(student.predict_velocity(x_t, SIGMA, given), alone, atol=1e-6, rtol=0)


def test_what_the_encoders_make_fits_the_network(model, directory):
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    encoders = model.encoders()
    raw = encoders.encode_video(video)
    assert raw.shape == (2, *LATENT_SHAPE)
    seen = encoders.encode_images(video)
    assert {name: tuple(value.shape[1:]) for name, value in seen.items()} == {
        "first_frame_latent": LATENT_SHAPE,
        "clip_feature": (IMAGE_TOKENS, IMAGE_DIM),
    }
    # The video is the first frame, and then grey: 0 in [-1, 1].
    vae = AutoencoderKLWan.from_pretrained(directory, subfolder="vae")
    grey = torch.cat([2 * video[:, :, :1] - 1, torch.zeros(2, 3, 8, 32, 32)], dim=2)
    with torch.no_grad():
        expected = model.normalize_latents(vae.encode(grey).latent_dist.mode())
    torch.testing.assert_close(seen["first_frame_latent"], expected, atol=1e-5, rtol=0)
    other = encoders.encode_images(video.flip(2))
    assert (other["clip_feature"] - seen["clip_feature"]).abs().max() > 1e-3


def test_streamed_decoding_equals_decoding_the_clip(directory):
    model = causal(directory, chunk_size=1)
    latents = draw(5, 1, *LATENT_SHAPE)
    decode = model.streaming_decoder()
    pieces = [decode(latents[:, :, frame : frame + 1]) for frame in range(3)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), model.decode_latents(latents), atol=1e-5, rtol=0)


def dmd2(directory, **cfg):
    roles = {
        role: MatrixGame2Model.from_pretrained(str(directory), trainable=role != "teacher")
        for role in ("student", "teacher", "critic")
    }
    options = DMD2Options(
        dmd_denoising_steps=(1000, 500), real_score_guidance_scale=3.0, cfg_uncond=CfgUncondOptions(**cfg)
    )
    return DMD2Method(roles, options)


@pytest.mark.parametrize("channel", ["image", "action"])
@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_dmd2s_unconditional_pass_is_as_the_policy_says(directory, monkeypatch, channel, policy):
    other = "image" if channel == "action" else "action"
    method = dmd2(directory, **{channel: policy, other: "keep"})
    recorder = Recorder(method.teacher, monkeypatch)
    [term] = list(method.losses("student", batch(), SampleRng(0, 1, [0, 1])))
    assert term.loss.isfinite()
    conditional, unconditional_call = recorder.calls
    names = {"image": ("encoder_hidden_states_image",), "action": ("mouse_cond", "keyboard_cond")}
    for name in names[other]:
        torch.testing.assert_close(unconditional_call[name], conditional[name])
    for name in names[channel]:
        value = unconditional_call[name]
        assert value is None if policy == "drop" else not value.any()
    first_frame = unconditional_call["hidden_states"][:, CHANNELS:]
    if channel == "image":
        assert not first_frame[:, 4:].any() and bool(first_frame[:, :4].any()) == (policy == "zero")


def test_guidance_that_would_do_nothing_is_refused(directory):
    with pytest.raises(ValueError, match="both passes would be the same; set method.cfg_uncond.action"):
        dmd2(directory)


def test_self_forcing_names_the_familys_causal_adapter(directory):
    models = dmd2(directory, action="zero").models
    with pytest.raises(ValueError, match=r"models.student._target_: fv_distill.models.CausalMatrixGame2Model$"):
        SelfForcingMethod(models, SelfForcingOptions(real_score_guidance_scale=1.0))


def test_velocity_and_noise_convention(model):
    """x_t = (1 - sigma) x0 + sigma eps, and the velocity of the true x0 leads back to it."""
    x0, eps = draw(1, 2, *LATENT_SHAPE), draw(2, 2, *LATENT_SHAPE)
    x_t = model.add_noise(x0, eps, SIGMA)
    torch.testing.assert_close(flow.velocity_to_x0(x_t, eps - x0, SIGMA), x0, atol=1e-5, rtol=0)
