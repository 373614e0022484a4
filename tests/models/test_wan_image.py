"""Image-to-video Wan beside parity: what it needs of the data, what policies do, and what it refuses."""

import pytest
import torch
from tiny_models import TEXT_DIM, TEXT_LENGTH
from tiny_wan import (
    CLIP_TEXT_LENGTH,
    IMAGE_DIM,
    IMAGE_TOKENS,
    make_ti2v_directory,
    make_transformer,
    make_wan21_i2v_directory,
    make_wan22_i2v_directory,
    make_wan22_t2v_directory,
)

from fv_distill.models import CausalWanModel, UncondPolicy, WanImageToVideoModel, WanModel, unconditional

SHAPE = (4, 3, 4, 4)
SIGMA = torch.tensor([0.7, 0.4])


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan_image")
    return {
        "wan21": make_wan21_i2v_directory(root / "wan21"),
        "wan22": make_wan22_i2v_directory(root / "wan22"),
        "ti2v": make_ti2v_directory(root / "ti2v"),
        "wan22_t2v": make_wan22_t2v_directory(root / "wan22_t2v"),
    }


def load(directories, name, **options):
    options |= {"expert": "low"} if name == "wan22" else {}
    length = CLIP_TEXT_LENGTH if name == "wan21" else TEXT_LENGTH
    return WanImageToVideoModel.from_pretrained(str(directories[name]), text_length=length, **options)


def make_batch(name, *, clips=True):
    generator = torch.Generator().manual_seed(0)
    length = CLIP_TEXT_LENGTH if name == "wan21" else TEXT_LENGTH
    batch = {
        "text_embedding": torch.randn(2, length, TEXT_DIM, generator=generator),
        "text_mask": torch.ones(2, length, dtype=torch.bool),
        "first_frame_latent": torch.randn(2, *SHAPE, generator=generator),
        "clip_feature": torch.randn(2, IMAGE_TOKENS, IMAGE_DIM, generator=generator),
        "latent_shape": SHAPE,
    }
    if name != "wan21":
        del batch["clip_feature"]
    if clips:
        batch["vae_latent"] = torch.randn(2, *SHAPE, generator=generator)
    return batch


@torch.no_grad()
def velocity(model, x_t, conditioning, sigma=SIGMA):
    return model.predict_velocity(x_t, sigma, conditioning)


@pytest.mark.parametrize("name", ["wan21", "wan22", "ti2v"])
def test_every_policy_of_the_image_acts(directories, name):
    model, batch = load(directories, name), make_batch(name, clips=False)
    prepared = model.prepare_batch(batch, latents_source="zeros")
    x_t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    seen = {
        policy: velocity(
            model, x_t, unconditional(prepared.conditioning, UncondPolicy(text="keep", image=policy), None)
        )
        for policy in ("keep", "zero", "drop")
    }
    assert torch.equal(seen["keep"], velocity(model, x_t, prepared.conditioning))
    for one, other in (("keep", "zero"), ("keep", "drop"), ("zero", "drop")):
        # The frames that are not given see the difference too.
        assert (seen[one] - seen[other])[:, :, 1:].abs().max() > 1e-4, (one, other)
    assert all(value.isfinite().all() for value in seen.values())


@pytest.mark.parametrize(
    ("name", "columns"), [("wan21", ["first_frame_latent", "clip_feature"]), ("wan22", ["first_frame_latent"])]
)
def test_a_condition_that_the_rows_lack_is_named(directories, name, columns):
    model = load(directories, name)
    for column in columns:
        batch = {key: value for key, value in make_batch(name).items() if key != column}
        with pytest.raises(ValueError, match=f"the rows of training.data.data_path have no {column}"):
            model.prepare_batch(batch)


def test_a_condition_of_another_shape_is_named(directories):
    model, batch = load(directories, "wan21"), make_batch("wan21")
    with pytest.raises(ValueError, match=r"first_frame_latent has the shape \(4, 1, 4, 4\).* needs \(4, 3, 4, 4\)"):
        model.prepare_batch(batch | {"first_frame_latent": batch["first_frame_latent"][:, :, :1]})
    with pytest.raises(ValueError, match=r"clip_feature has the shape \(5, 7\).* needs \(5, 12\)"):
        model.prepare_batch(batch | {"clip_feature": batch["clip_feature"][..., :7]})


def test_ti2v_takes_its_frame_from_the_clip(directories):
    model, batch = load(directories, "ti2v"), make_batch("ti2v")
    first = model.normalize_latents(batch["vae_latent"])[:, :, :1]
    # What a column says of the frame is the same frame, rounded otherwise.
    for given in (batch, {key: value for key, value in batch.items() if key != "first_frame_latent"}):
        assert torch.equal(model.prepare_batch(given).conditioning.extras["first_frame_latent"], first)


def test_ti2v_of_text_only_rows_needs_the_column_of_any_length(directories):
    model, batch = load(directories, "ti2v"), make_batch("ti2v", clips=False)
    frame = batch["first_frame_latent"]
    for given in (frame, frame[:, :, :1]):
        prepared = model.prepare_batch(batch | {"first_frame_latent": given}, latents_source="zeros")
        assert torch.equal(prepared.conditioning.extras["first_frame_latent"], frame[:, :, :1])
    del batch["first_frame_latent"]
    with pytest.raises(ValueError, match="have no first_frame_latent"):
        model.prepare_batch(batch, latents_source="zeros")


def test_ti2v_of_sampling_paths_takes_the_frame_of_their_ends(directories):
    model, batch = load(directories, "ti2v"), make_batch("ti2v", clips=False)
    del batch["first_frame_latent"]
    batch["trajectory_latents"] = torch.randn(2, 3, *SHAPE)
    prepared = model.prepare_batch(batch, latents_source="zeros")
    assert torch.equal(prepared.conditioning.extras["first_frame_latent"], batch["trajectory_latents"][:, -1, :, :1])


def test_ti2v_leads_to_the_given_frame_and_trains_on_the_others(directories):
    model, batch = load(directories, "ti2v", trainable=True), make_batch("ti2v")
    prepared = model.prepare_batch(batch)
    image, noise = prepared.conditioning.extras["first_frame_latent"], torch.randn(2, *SHAPE)
    x_t = model.add_noise(prepared.latents, noise, SIGMA)
    x0 = model.predict_x0(x_t, SIGMA, prepared.conditioning)
    torch.testing.assert_close(x0[:, :, :1], image, atol=1e-6, rtol=0)
    # Its own noisy copy of the first frame is nothing that the network sees.
    noisy = torch.cat([torch.randn_like(image), x_t[:, :, 1:]], dim=2)
    torch.testing.assert_close(model.predict_x0(noisy, SIGMA, prepared.conditioning), x0, atol=1e-5, rtol=0)
    error = (model.predict_velocity(x_t, SIGMA, prepared.conditioning) - (noise - prepared.latents)).square()
    assert error[:, :, 0].max() < 1e-9 and error[:, :, 1:].max() > 1e-2
    error.mean().backward()
    assert model.transformer.proj_out.weight.grad.abs().max() > 0
    at_zero = velocity(model, prepared.latents, prepared.conditioning, sigma=torch.zeros(2))
    assert at_zero.isfinite().all() and at_zero[:, :, 0].abs().max() == 0


def test_a_sigma_per_frame_equals_one_per_sample_when_constant(directories):
    for name in ("wan21", "ti2v"):
        model, batch = load(directories, name), make_batch(name)
        prepared = model.prepare_batch(batch)
        one = velocity(model, prepared.latents, prepared.conditioning)
        many = velocity(model, prepared.latents, prepared.conditioning, sigma=SIGMA[:, None].expand(2, 3))
        torch.testing.assert_close(many, one, atol=1e-5, rtol=0)


def test_what_the_wrong_adapter_gets_names_the_right_one(directories, tiny_wan):
    with pytest.raises(ValueError, match="use fv_distill.models.WanImageToVideoModel"):
        WanModel.from_pretrained(str(directories["wan21"]), text_length=512)
    with pytest.raises(ValueError, match="is no image-to-video Wan: its network reads 4 channels.*WanModel"):
        WanImageToVideoModel.from_pretrained(str(tiny_wan))
    with pytest.raises(ValueError, match="no causal adapter"):
        CausalWanModel.from_pretrained(str(directories["wan21"]))


def test_wan21_takes_512_tokens_of_text_and_no_others(directories):
    with pytest.raises(ValueError, match="set training.data.text_length: 512"):
        WanImageToVideoModel.from_pretrained(str(directories["wan21"]), text_length=256)


def test_first_and_last_frame_networks_are_refused(directories):
    config = make_transformer(0, in_channels=12, image_dim=IMAGE_DIM, added_kv_proj_dim=24, pos_embed_seq_len=10).config
    with pytest.raises(ValueError, match="first-last-frame"):
        WanImageToVideoModel.check_network(config, directories["wan21"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set models.<role>.expert to high .sigma from 0.875 up. or low"),
        ({"expert": "medium"}, "expert=medium"),
        ({"expert": "high", "boundary_ratio": 1.5}, "boundary_ratio=1.5"),
    ],
)
def test_a_directory_of_two_experts_wants_one_chosen(directories, options, message):
    with pytest.raises(ValueError, match=message):
        WanModel.from_pretrained(str(directories["wan22_t2v"]), **options)


def test_a_directory_of_one_network_has_no_experts(directories, tiny_wan):
    for kind, directory in ((WanModel, tiny_wan), (WanImageToVideoModel, directories["ti2v"])):
        with pytest.raises(ValueError, match="one for all noise levels; remove the keys"):
            kind.from_pretrained(str(directory), expert="high")


def test_no_causal_student_starts_from_experts(directories):
    with pytest.raises(ValueError, match="one for high and one for low noise"):
        CausalWanModel.from_pretrained(str(directories["wan22_t2v"]))
    base = WanModel.from_pretrained(str(directories["wan22_t2v"]), expert="high")
    with pytest.raises(ValueError, match="one for high and one for low noise"):
        CausalWanModel.on_base(base)


def test_a_role_on_an_experts_network_is_that_expert(directories):
    base = WanModel.from_pretrained(str(directories["wan22_t2v"]), expert="low", boundary_ratio=0.8)
    role = WanModel.on_base(base)
    assert (role.component, role.sigma_range) == ("transformer_2", (0.0, 0.8))
    assert role.pipeline_config == {"boundary_ratio": 0.8}
    with pytest.raises(ValueError, match="contradict the role whose network is shared"):
        WanModel.on_base(base, expert="high")


def test_experts_are_the_networks_of_their_names(directories):
    high, low = (WanModel.from_pretrained(str(directories["wan22_t2v"]), expert=name) for name in ("high", "low"))
    assert (high.component, low.component) == ("transformer", "transformer_2")
    assert not torch.equal(high.transformer.proj_out.weight, low.transformer.proj_out.weight)
    assert [high.covers(sigma) for sigma in (1.0, 0.875, 0.874, 0.0)] == [True, True, False, False]
    assert [low.covers(sigma) for sigma in (1.0, 0.875, 0.874, 0.0)] == [False, False, True, True]
