import json
import shutil

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from safetensors.torch import save_file
from tiny_models import TEXT_DIM, TEXT_LENGTH, make_tiny_transformer

from fv_distill.models import Conditioning, UncondPolicy, WanModel, unconditional
from fv_distill.models.pretrained import read_latent_statistics, read_vae_factors


@pytest.fixture
def model(tiny_wan):
    return WanModel.from_pretrained(str(tiny_wan), text_length=TEXT_LENGTH)


def test_prepare_batch_normalises_with_the_vaes_statistics(model, batch):
    latents = model.prepare_batch(batch).latents
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.5, 0.5, 2.0, 1.0])
    expected = (batch["vae_latent"] - mean.view(1, 4, 1, 1, 1)) / std.view(1, 4, 1, 1, 1)
    torch.testing.assert_close(latents, expected)


def test_normalise_and_decode_are_inverse_up_to_the_vae(model, batch):
    """Decoding must undo exactly what normalising did: compare with the VAE on the raw latents."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(model.directory, subfolder="vae")
    with torch.no_grad():
        expected = (vae.decode(batch["vae_latent"]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode_latents(model.prepare_batch(batch).latents), expected, atol=1e-5, rtol=0)


def test_dropped_captions_become_the_empty_prompt(model, batch):
    batch["caption_dropped"] = torch.tensor([True, False])
    text = model.prepare_batch(batch).conditioning.text
    assert torch.equal(text[0], model.encode_prompts([""]).text[0])
    assert torch.equal(text[1], batch["text_embedding"][1])


def test_prompts_are_padded_with_zeros_and_masked(model):
    conditioning = model.encode_prompts(["a digit", "a handwritten digit moving left"])
    assert conditioning.text.shape == (2, TEXT_LENGTH, TEXT_DIM)
    assert conditioning.text_mask.sum(1).tolist() == [3, 6]
    assert conditioning.text[0, 3:].abs().max() == 0


def test_zeros_need_only_a_shape(model, batch):
    assert model.prepare_batch(batch, latents_source="zeros").latents.abs().max() == 0
    del batch["vae_latent"]
    batch["latent_shape"] = (4, 5, 2, 2)
    assert model.prepare_batch(batch, latents_source="zeros").latents.shape == (2, 4, 5, 2, 2)


def test_missing_latents_name_the_key(model, batch):
    del batch["vae_latent"]
    with pytest.raises(ValueError, match="training.data.latent_shape"):
        model.prepare_batch(batch, latents_source="zeros")
    with pytest.raises(ValueError, match="vae_latent"):
        model.prepare_batch(batch)


def test_sigma_per_frame_equals_sigma_per_sample_when_constant(model, batch):
    prepared = model.prepare_batch(batch)
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        per_sample = model.predict_velocity(prepared.latents, sigma, prepared.conditioning)
        per_frame = model.predict_velocity(prepared.latents, sigma[:, None].expand(2, 3), prepared.conditioning)
        other = model.predict_velocity(prepared.latents, torch.tensor([[0.3, 0.5, 0.9]] * 2), prepared.conditioning)
    torch.testing.assert_close(per_frame, per_sample, atol=1e-5, rtol=0)
    assert (other - per_sample).abs().max() > 1e-4


def test_guidance_scale_one_runs_one_pass(model, batch):
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    prepared = model.prepare_batch(batch)
    with torch.no_grad():
        model.predict_x0_guided(prepared.latents, torch.ones(2), prepared.conditioning, None, 1.0)
        assert len(calls) == 1
        model.predict_x0_guided(prepared.latents, torch.ones(2), prepared.conditioning, prepared.conditioning, 2.0)
        assert len(calls) == 3


def test_gradient_checkpointing_changes_no_gradient(tiny_wan, batch):
    gradients = []
    for checkpointing in (False, True):
        model = WanModel.from_pretrained(
            str(tiny_wan), trainable=True, gradient_checkpointing=checkpointing, text_length=TEXT_LENGTH
        )
        assert model.transformer.is_gradient_checkpointing is checkpointing
        prepared = model.prepare_batch(batch)
        model.predict_velocity(
            prepared.latents, torch.tensor([0.3, 0.8]), prepared.conditioning
        ).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.transformer.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)


def test_attention_backend_is_set_and_a_wrong_one_refused(tiny_wan, batch):
    """On the network alone: diffusers would make it every other one's as well, a teacher's that asks for none."""
    default = _AttentionBackendRegistry.get_active_backend()
    assert default[0] != AttentionBackendName._NATIVE_MATH
    native = WanModel.from_pretrained(str(tiny_wan), attention_backend="_native_math", text_length=TEXT_LENGTH)
    plain = WanModel.from_pretrained(str(tiny_wan), text_length=TEXT_LENGTH)
    prepared = plain.prepare_batch(batch)
    outputs = [m.predict_velocity(prepared.latents, torch.ones(2), prepared.conditioning) for m in (native, plain)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    with pytest.raises(ValueError):
        WanModel.from_pretrained(str(tiny_wan), attention_backend="warp_drive")
    assert _AttentionBackendRegistry.get_active_backend() == default
    for model, backend in ((native, AttentionBackendName._NATIVE_MATH), (plain, None)):
        assert {block.attn1.processor._attention_backend for block in model.transformer.blocks} == {backend}


def test_half_precision_networks_return_fp32(tiny_wan, batch):
    model = WanModel.from_pretrained(str(tiny_wan), dtype="bfloat16", text_length=TEXT_LENGTH)
    prepared = model.prepare_batch(batch)
    with torch.no_grad():
        assert model.predict_velocity(prepared.latents, torch.ones(2), prepared.conditioning).dtype == torch.float32
    assert {parameter.dtype for parameter in model.transformer.parameters()} >= {torch.bfloat16}


def test_weights_override_and_its_errors(tiny_wan, tmp_path):
    other = make_tiny_transformer(seed=7)
    path = tmp_path / "weights.safetensors"
    save_file(other.state_dict(), path)
    model = WanModel.from_pretrained(str(tiny_wan), weights=str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.transformer.parameters(), other.parameters(), strict=True))
    for shard in (0, 1):
        keys = list(other.state_dict())[shard::2]
        (tmp_path / "shards").mkdir(exist_ok=True)
        save_file({key: other.state_dict()[key] for key in keys}, tmp_path / f"shards/{shard}.safetensors")
    model = WanModel.from_pretrained(str(tiny_wan), weights=str(tmp_path / "shards"))
    assert all(torch.equal(a, b) for a, b in zip(model.transformer.parameters(), other.parameters(), strict=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no directory with .safetensors files"):
        WanModel.from_pretrained(str(tiny_wan), weights=str(tmp_path / "empty"))
    broken = dict(other.state_dict())
    broken["surplus"] = broken.pop("proj_out.bias")
    broken["proj_out.weight"] = broken["proj_out.weight"][:1].clone()
    save_file(broken, path)
    with pytest.raises(
        ValueError, match=r"missing proj_out.bias.*unexpected surplus.*proj_out.weight has shape \(1, 24\)"
    ):
        WanModel.from_pretrained(str(tiny_wan), weights=str(path))


@pytest.mark.parametrize(
    ("shape", "num_frames", "message"),
    [
        ((5, 3, 4, 4), None, "5 channels"),
        ((4, 3, 5, 4), None, "H=5 does not divide by the patch size 2"),
        ((4, 3, 4, 4), 10, "3 latent frames are 9 frames"),
        ((3, 4, 4), None, r"expected \[C, T, H, W\]"),
    ],
)
def test_shapes_that_do_not_fit_are_explained(model, shape, num_frames, message):
    with pytest.raises(ValueError, match=message):
        model.check_latent_shape(shape, num_frames=num_frames)


def test_missing_models_are_explained(tmp_path, tiny_wan):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        WanModel.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        WanModel.from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="could not be had from the Hub"):
        WanModel.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        WanModel.from_pretrained(str(tiny_wan), dtype="int4")


@pytest.mark.parametrize("policy", ["keep", "zero", "drop", "negative_prompt"])
def test_unconditional_text(policy):
    own = Conditioning(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), {"clip_feature": torch.ones(2, 5)})
    negative = Conditioning(torch.full((1, 3, 4), 7.0), torch.zeros(1, 3, dtype=torch.bool))
    result = unconditional(own, UncondPolicy(text=policy), negative)
    expected = {"keep": 1.0, "zero": 0.0, "negative_prompt": 7.0}
    if policy == "drop":
        assert result.text is None and result.text_mask is None
    else:
        assert torch.equal(result.text, torch.full((2, 3, 4), expected[policy]))
    assert torch.equal(result.extras["clip_feature"], own.extras["clip_feature"])


@pytest.mark.parametrize(("policy", "expected"), [("keep", 1.0), ("zero", 0.0), ("drop", None)])
def test_unconditional_image_and_action(policy, expected):
    extras = {"clip_feature": torch.ones(2, 5), "mouse_cond": torch.ones(2, 3)}
    own = Conditioning(torch.ones(2, 3, 4), None, extras)
    result = unconditional(own, UncondPolicy(text="keep", image=policy), None).extras
    assert torch.equal(result["mouse_cond"], extras["mouse_cond"])
    assert ("clip_feature" not in result) if expected is None else bool((result["clip_feature"] == expected).all())


@pytest.mark.parametrize("policy", ["keep", "zero", "drop", "negative_prompt"])
def test_what_a_second_text_encoder_made_goes_where_the_text_goes(policy):
    def of_value(value, count):
        extras = {
            "pooled_text_embedding": torch.full((count, 5), value),
            "text_mask_2": torch.full((count, 3), value > 0),
        }
        return Conditioning(torch.full((count, 3, 4), value), None, extras)

    own = of_value(1.0, 2)
    result = unconditional(own, UncondPolicy(text=policy), of_value(-7.0, 1)).extras
    if policy == "drop":
        assert not result
    else:
        expected = {"keep": 1.0, "zero": 0.0, "negative_prompt": -7.0}[policy]
        assert torch.equal(result["pooled_text_embedding"], torch.full((2, 5), expected))
        # A mask tells which tokens there are; only another text has others.
        assert bool(result["text_mask_2"].all()) == (policy != "negative_prompt")


def test_a_dropped_caption_takes_the_second_text_along(tiny_wan, batch, monkeypatch):
    model = WanModel.from_pretrained(str(tiny_wan), text_length=8)
    empty = model.encode_prompts([""])
    monkeypatch.setitem(empty.extras, "pooled_text_embedding", torch.full((1, 5), -1.0))
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: empty)
    rows = batch | {"pooled_text_embedding": torch.ones(2, 5), "caption_dropped": torch.tensor([False, True])}
    extras = model.prepare_batch(rows).conditioning.extras
    assert extras["pooled_text_embedding"].mean(1).tolist() == [1.0, -1.0]


def test_a_video_goes_to_latents_and_back(tiny_wan, batch):
    model = WanModel.from_pretrained(str(tiny_wan), text_length=8)
    video = model.decode_latents(model.normalize_latents(batch["vae_latent"]))
    encoders = model.encoders()
    latents = encoders.encode_video(video)
    assert latents.shape == batch["vae_latent"].shape and latents.dtype == torch.float32
    posterior = encoders.vae.encode(2 * video - 1).latent_dist
    torch.testing.assert_close(latents, posterior.mean)


def test_an_older_directory_has_its_vaes_defaults(tiny_wan, tmp_path):
    """diffusers wrote no scale factors into configs before Wan 2.2; they are the class's defaults."""
    directory = shutil.copytree(tiny_wan, tmp_path / "older")
    path = directory / "vae/config.json"
    config = json.loads(path.read_text())
    for key in ("scale_factor_temporal", "scale_factor_spatial"):
        del config[key]
    path.write_text(json.dumps(config))
    assert WanModel.from_pretrained(str(directory)).temporal_factor == 4
    assert read_vae_factors(directory) == (4, 8)
    del config["_class_name"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="doesn't tell how much larger"):
        read_vae_factors(directory)


def test_latents_of_a_scaling_factor(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"scaling_factor": 0.25}))
    mean, std = read_latent_statistics(tmp_path)
    assert mean.item() == 0 and std.item() == 4
