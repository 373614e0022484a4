"""Adapters by role: one frozen network under student, critic and teacher equals three networks."""

import pytest
import torch
from tiny_models import TEXT_LENGTH, make_tiny_transformer

from fv_distill.lora import AdapterSwitch, LoraSpec, inject_lora, is_lora_parameter, lora_key
from fv_distill.methods import DMD2Method, DMD2Options, SelfForcingMethod, SelfForcingOptions
from fv_distill.models import CausalWanModel, WanModel
from fv_distill.models.transformers import CausalWanTransformer3DModel
from fv_distill.rng import SampleRng

ROLES = ("student", "teacher", "critic")
OPTIONS = {"rank": 3, "alpha": 5.0, "target_modules": "all"}


def make_teacher(tiny_wan):
    return WanModel(
        make_tiny_transformer(1), directory=tiny_wan, flow_shift=3.0, negative_prompt="bad", text_length=TEXT_LENGTH
    )


def randomize(model, seed):
    """Both factors: one that starts at zero would hide what the other does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.transformer.named_parameters():
        if is_lora_parameter(name, model.adapter):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def shared_models(tiny_wan, *, causal=False, checkpointing=False, **options):
    teacher = make_teacher(tiny_wan)
    student_class, chunks = (CausalWanModel, {"chunk_size": 1}) if causal else (WanModel, {})
    common = {"negative_prompt": "bad", "text_length": TEXT_LENGTH}
    critic = WanModel.on_base(teacher, **common)
    student = student_class.on_base(teacher, **common, **chunks)
    models = {"student": student, "teacher": teacher, "critic": critic}
    add_adapters(models, checkpointing=checkpointing, **options)
    return models


def separate_models(tiny_wan, *, causal=False, checkpointing=False, **options):
    models = {role: make_teacher(tiny_wan) for role in ROLES}
    if causal:
        network = models["student"].transformer
        CausalWanTransformer3DModel.convert(network)
        models["student"] = CausalWanModel(
            network, directory=tiny_wan, flow_shift=3.0, negative_prompt="bad", text_length=TEXT_LENGTH, chunk_size=1
        )
    add_adapters(models, checkpointing=checkpointing, **options)
    return models


def add_adapters(models, *, checkpointing, **options):
    for seed, role in enumerate(("student", "critic")):
        models[role].add_lora(role, **{**OPTIONS, **options})
        randomize(models[role], seed)
        if checkpointing:
            models[role].enable_gradient_checkpointing()


def losses_and_gradients(models, batch, *, causal, step, **options):
    """A whole cycle's update of both roles."""
    kind, options_class = (SelfForcingMethod, SelfForcingOptions) if causal else (DMD2Method, DMD2Options)
    method = kind(models, options_class(real_score_guidance_scale=3.0, **options))
    method.encode_prompts()
    losses, gradients = [], {}
    for role in ("student", "critic"):
        for term in method.losses(role, batch, SampleRng(0, step, batch["sample_index"])):
            term.loss.backward()
            losses.append(term.loss.item())
        for name, parameter in models[role].transformer.named_parameters():
            if models[role].is_trained(name):
                gradients[name] = parameter.grad.clone()
            else:
                # One role's update leaves nothing on another's adapter, nor on the base.
                assert parameter.grad is None or not parameter.grad.any(), name
        models[role].transformer.zero_grad()
    return losses, gradients


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True], ids=["dmd2", "self_forcing"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_shared_base_trains_as_three_networks_do(tiny_wan, batch, causal, checkpointing, step):
    actual = losses_and_gradients(
        shared_models(tiny_wan, causal=causal, checkpointing=checkpointing), batch, causal=causal, step=step
    )
    expected = losses_and_gradients(separate_models(tiny_wan, causal=causal), batch, causal=causal, step=step)
    assert actual[0] == pytest.approx(expected[0], abs=1e-6)
    assert actual[1].keys() == expected[1].keys() and len(actual[1]) == 2 * 2 * 2 * 10
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=1e-6, rtol=1e-5)
        assert gradient.abs().max() > 1e-6, f"{name}: a gradient of zero proves nothing"


def test_without_replay_all_chunks_recompute_under_the_student(tiny_wan, batch):
    """The teacher and the critic run between the forward and the backward pass of a clip's whole graph."""
    kwargs = {"causal": True, "step": 4, "gradient_replay": False}
    actual = losses_and_gradients(shared_models(tiny_wan, causal=True, checkpointing=True), batch, **kwargs)
    expected = losses_and_gradients(separate_models(tiny_wan, causal=True), batch, **kwargs)
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("active", ["critic", None])
def test_recomputation_under_another_active_role_gives_the_same_gradients(tiny_wan, batch, active):
    gradients = []
    for checkpointing in (False, True):
        models = shared_models(tiny_wan, checkpointing=checkpointing)
        student = models["student"]
        prepared = student.prepare_batch(batch)
        velocity = student.predict_velocity(prepared.latents, torch.tensor([0.4, 0.9]), prepared.conditioning)
        with student.switch.using(active):
            velocity.square().mean().backward()
            assert student.switch.current == active, "recomputing puts back what it found"
        gradients.append({n: p.grad for n, p in student.transformer.named_parameters() if student.is_trained(n)})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_a_role_never_leaks(tiny_wan, batch):
    models = shared_models(tiny_wan)
    switch = models["student"].switch
    prepared = models["student"].prepare_batch(batch)
    bare = make_teacher(tiny_wan)
    for role in ROLES:
        models[role].predict_velocity(prepared.latents, torch.ones(2), prepared.conditioning)
        assert switch.current == "student", "pipelines, which know of no roles, see the student"
    with torch.no_grad():
        outputs = [
            model.predict_velocity(prepared.latents, torch.ones(2), prepared.conditioning)
            for model in (*models.values(), bare)
        ]
    torch.testing.assert_close(outputs[1], outputs[3], atol=0, rtol=0)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 < (outputs[0] - outputs[2]).abs().max()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        models["critic"].call_network(
            hidden_states=prepared.latents, timestep=torch.ones(2), encoder_hidden_states=torch.zeros(2, 3, 5)
        )
    assert switch.current == "student"


def test_one_copy_of_the_base_is_held(tiny_wan):
    models = shared_models(tiny_wan, causal=True)
    networks = {id(model.transformer) for model in models.values()}
    assert len(networks) == 1
    network = models["teacher"].transformer
    base = sum(parameter.numel() for name, parameter in network.named_parameters() if "lora_" not in name)
    assert base == sum(parameter.numel() for parameter in make_tiny_transformer().parameters())


def test_an_adapter_starts_as_nothing_and_from_its_seed(tiny_wan, batch):
    prepared = make_teacher(tiny_wan).prepare_batch(batch)

    def run(model):
        with torch.no_grad():
            return model.predict_velocity(prepared.latents, torch.ones(2), prepared.conditioning)

    bare = make_teacher(tiny_wan)
    state = torch.get_rng_state()
    factors = []
    for seed in (0, 0, 1):
        model = make_teacher(tiny_wan)
        model.add_lora("student", rank=2, seed=seed)
        torch.testing.assert_close(run(model), run(bare), atol=0, rtol=0)
        factors.append(model.transformer.blocks[0].attn1.to_q.lora_A["student"].weight)
    assert torch.equal(factors[0], factors[1]) and not torch.equal(factors[0], factors[2])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is nobody's business"


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 5 / 3), ({"rslora": True}, 5 / 3**0.5), ({"alpha": None}, 1.0)], ids=str
)
def test_the_product_is_scaled_as_its_options_say(tiny_wan, options, scale):
    model = make_teacher(tiny_wan)
    model.add_lora("student", **{**OPTIONS, "target_modules": ["ffn.net.2"], **options})
    randomize(model, 0)
    layer = model.transformer.blocks[1].ffn.net[2]
    x = torch.randn(4, layer.in_features)
    product = layer.lora_B["student"].weight @ layer.lora_A["student"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ product.T)
    untouched = model.transformer.blocks[1].attn1.to_q
    assert isinstance(untouched, torch.nn.Linear)


def test_dora_trains_magnitudes_too(tiny_wan):
    models = shared_models(tiny_wan, dora=True)
    trained = {lora_key(name, "critic") for name, _ in models["critic"].transformer.named_parameters()
               if models["critic"].is_trained(name)}  # fmt: skip
    assert "blocks.1.ffn.net.2.lora_magnitude_vector.weight" in trained


def test_adapters_of_a_half_precision_base_are_float32(tiny_wan):
    teacher = WanModel(make_tiny_transformer(1).to(torch.bfloat16), directory=tiny_wan, flow_shift=3.0)
    student = WanModel.on_base(teacher)
    student.add_lora("student", rank=2)
    types = {parameter.dtype for name, parameter in student.transformer.named_parameters() if student.is_trained(name)}
    assert types == {torch.float32} and teacher.transformer.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["to_q", "to_x"],
            "target_modules: to_x matches no linear layer of WanTransformer3DModel; it has .*attn1.to_q",
        ),
        ([], "the list is empty"),
        ("everything", "'everything' is no preset of WanModel; it has attention, all, linear"),
    ],
)
def test_targets_that_match_nothing_are_refused(tiny_wan, targets, message):
    with pytest.raises(ValueError, match=message):
        make_teacher(tiny_wan).add_lora("student", rank=2, target_modules=targets)


def test_a_base_that_changes_is_no_base(tiny_wan):
    trained = WanModel(make_tiny_transformer(1), directory=tiny_wan, flow_shift=3.0, trainable=True)
    with pytest.raises(ValueError, match="can neither be trainable nor have a LoRA"):
        WanModel.on_base(trained)


def test_names_with_and_without_the_adapter():
    assert lora_key("blocks.0.attn1.to_q.lora_A.student.weight", "student") == "blocks.0.attn1.to_q.lora_A.weight"
    assert is_lora_parameter("a.lora_B.critic.weight", "critic") and not is_lora_parameter("a.critic.weight", "critic")
    assert not is_lora_parameter("a.lora_B.critic.weight", "student")


def test_a_switch_is_put_back_after_an_error():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    inject_lora(network, "one", LoraSpec(1, 1.0, ("0",)))
    switch = AdapterSwitch(network, resting="one")
    with pytest.raises(KeyError), switch.using(None):
        raise KeyError
    assert switch.current == "one" and not network[0]._disable_adapters
