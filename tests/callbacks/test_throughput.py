import json
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import make_tiny_transformer
from tiny_runs import checkpoint, finetune_config, metric_lines, train
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode

from fv_distill.callbacks import ThroughputCallback, throughput
from fv_distill.callbacks.call_meter import CallMeter, FlopCount

# Multiplications and additions of [5, 8] through 8 -> 16 -> 4.
FORWARD = 2 * 5 * (8 * 16 + 16 * 4)


def perceptron():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


# Operations


def test_a_trained_networks_call_is_three_forwards():
    network = perceptron()
    meter = CallMeter(network)
    for calls in (1, 2):
        network(torch.randn(5, 8)).sum().backward()
        assert meter.performed == meter.needed == calls * 3 * FORWARD
    with torch.no_grad():
        network(torch.randn(5, 8))
    assert meter.performed == 7 * FORWARD
    meter.reset()
    network(torch.randn(10, 8))
    assert meter.performed == 6 * FORWARD, "another shape is another cost"
    meter.detach()
    network(torch.randn(5, 8))
    assert meter.performed == 6 * FORWARD


def test_a_frozen_network_is_differentiated_for_its_inputs_only():
    network = perceptron().requires_grad_(False)
    meter = CallMeter(network)
    network(torch.randn(5, 8))
    assert meter.performed == FORWARD
    network(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert meter.performed == FORWARD + 2 * FORWARD


def test_recomputation_is_performed_but_not_needed():
    class Recomputing(nn.Module):
        gradient_checkpointing = True

        def __init__(self):
            super().__init__()
            self.inner = perceptron()

        def forward(self, x):
            return recompute(self.inner, x, use_reentrant=False)

    network = Recomputing()
    meter = CallMeter(network)
    network(torch.randn(5, 8)).sum().backward()
    assert (meter.needed, meter.performed) == (3 * FORWARD, 4 * FORWARD)


def test_an_objects_cost_key_tells_calls_apart():
    class Cache:
        def __init__(self, frames):
            self.cost_key = (frames,)

    class Repeating(nn.Linear):
        def forward(self, x, cache):
            for _ in range(cache.cost_key[0]):
                out = super().forward(x)
            return out

    network = Repeating(8, 16)
    meter = CallMeter(network)
    with torch.no_grad():
        for frames in (1, 3, 1):
            network(torch.randn(5, 8), cache=Cache(frames))
    assert meter.performed == (1 + 3 + 1) * 2 * 5 * 8 * 16


def test_a_call_that_fails_leaves_nothing_on():
    network = perceptron()
    meter = CallMeter(network)
    with pytest.raises(RuntimeError):
        network(torch.randn(5, 9))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    network(torch.randn(5, 8))
    assert meter.performed == 3 * FORWARD


def test_a_wan_network_against_torchs_own_counter():
    """Forward exactly; backward by the rule, where the counter misses the CPU's attention."""
    network = make_tiny_transformer(width=48)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }
    with torch.no_grad(), FlopCount() as mine:
        network(**inputs)
    theirs = FlopCounterMode(display=False)
    with torch.no_grad(), theirs, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(**inputs)
    assert mine.total == theirs.get_total_flops()
    both = FlopCounterMode(display=False)
    with both, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(**inputs).sample.sum().backward()
    meter = CallMeter(network)
    network(**inputs)
    assert meter.performed == pytest.approx(both.get_total_flops(), rel=0.03)


def test_compiled_functions_stay_compiled():
    """torch's own counter would leave this one uncompiled for good."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.function = torch.compile(lambda x: x.sin().cos(), backend=backend)

        def forward(self, x):
            return self.function(x)

    network = Network()
    CallMeter(network)
    network(torch.randn(3))
    assert len(compiled) == 1


def test_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = nn.parallel.DistributedDataParallel(perceptron())
        meter = CallMeter(network)
        network(torch.randn(5, 8)).sum().backward()
        assert meter.performed == 3 * FORWARD
    finally:
        torch.distributed.destroy_process_group()


# Time


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    return now


def fake_trainer(tmp_path, logged, *, device="cpu", mixed_precision="no"):
    accelerator = SimpleNamespace(
        device=torch.device(device),
        is_main_process=True,
        gather=lambda tensor: tensor,
        log=lambda values, step: logged.append((step, values)),
        mixed_precision=mixed_precision,
    )
    training = SimpleNamespace(output_dir=str(tmp_path), loop=SimpleNamespace(max_train_steps=10))
    return SimpleNamespace(
        models={"student": SimpleNamespace(transformer=perceptron(), dtype=torch.float32)},
        accelerator=accelerator,
        plan=SimpleNamespace(global_batch_size=6),
        config=SimpleNamespace(training=training),
        step=0,
    )


def test_times_in_closed_form(clock, tmp_path):
    logged = []
    trainer = fake_trainer(tmp_path, logged)
    trainer.models["teacher"] = trainer.models["student"]
    callback = ThroughputCallback(every_steps=2, window=3, peak_tflops=1e-9)
    callback.on_train_start(trainer)
    for step, seconds in enumerate([100.0, 1.0, 2.0, 6.0, 4.0], start=1):
        trainer.step = step
        trainer.models["student"].transformer(torch.randn(5, 8))
        clock.seconds += seconds
        callback.on_training_step_end(trainer, {})
        if step == 3:
            callback.on_validation_begin(trainer)
            trainer.models["student"].transformer(torch.randn(5, 8))
            clock.seconds += 1000
            callback.on_validation_end(trainer)
    callback.on_close(trainer)
    (first, values), (second, later) = logged
    assert (first, second) == (2, 4)
    assert values["throughput/step_seconds_median"] == values["throughput/step_seconds_mean"] == 1.0
    assert values["throughput/eta_seconds"] == 8.0
    # Steps of 1, 2 and 6 s, each with one call of a network that two roles share; the first step counts for nothing.
    assert later["throughput/step_seconds_median"] == 2.0 and later["throughput/step_seconds_mean"] == 3.0
    assert later["throughput/samples_per_second"] == 2.0 and later["throughput/eta_seconds"] == 18.0
    rate = 3 * 3 * FORWARD / 9.0
    assert later["throughput/tflops_per_device"] == pytest.approx(rate / 1e12)
    assert later["throughput/mfu"] == later["throughput/hfu"] == pytest.approx(rate / 1e3)
    assert later["throughput/peak_memory_gb"] > 0.01
    lines = [json.loads(line) for line in (tmp_path / "throughput.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[1]["time"] > 1e9
    assert {key: value for key, value in lines[1].items() if key not in ("step", "time")} == later


@pytest.mark.parametrize(
    ("mixed_precision", "matmul", "tera"), [("bf16", "highest", 989.5), ("no", "highest", 67), ("no", "high", 494.5)]
)
def test_the_peak_of_a_known_device(monkeypatch, tmp_path, mixed_precision, matmul, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    trainer = fake_trainer(tmp_path, [], device="cuda:0", mixed_precision=mixed_precision)
    assert throughput._known_peak(trainer) == tera * 1e12
    assert throughput._known_peak(fake_trainer(tmp_path, [])) is None


@pytest.mark.parametrize(
    "options", [{"every_steps": 0}, {"window": 0}, {"peak_tflops": 0.0}, {"every_steps": True}, {"window": 2.5}]
)
def test_bad_options_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"callbacks\.throughput\.{name}="):
        ThroughputCallback(**options)


# A run


def test_a_run_and_its_continuation(tiny_wan, tiny_rows, tmp_path):
    config = finetune_config(tiny_wan, tiny_rows, tmp_path / "plain")
    plain = train(config)
    config["callbacks"] = {"throughput": {"every_steps": 3, "peak_tflops": 0.5}}
    config["training"]["tracker"]["trackers"] = ["tensorboard"]
    output_dir = train(config, {"training.output_dir": str(tmp_path / "run")})
    assert metric_lines(output_dir) == metric_lines(plain), "measuring changes nothing"
    lines = [json.loads(line) for line in (output_dir / "throughput.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    events = EventAccumulator(str(output_dir / "logs" / "fv_distill")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("throughput/step_seconds_mean")]
    assert logged == [(line["step"], pytest.approx(line["throughput/step_seconds_mean"])) for line in lines]
    with torch.no_grad(), FlopCount() as count:
        make_tiny_transformer()(torch.randn(2, 4, 3, 4, 4), torch.zeros(2), torch.randn(2, 8, 16))
    performed = lines[0]["throughput/tflops_per_device"] * 1e12 * lines[0]["throughput/step_seconds_mean"]
    assert performed == pytest.approx(3 * count.total, rel=1e-5)
    train(
        config,
        {
            "training.output_dir": str(tmp_path / "run"),
            "training.checkpoint.resume_from_checkpoint": "latest",
            "training.loop.max_train_steps": 6,
        },
    )
    lines = [json.loads(line) for line in (output_dir / "throughput.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6]
    assert checkpoint(output_dir, 6).is_dir()
