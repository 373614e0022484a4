"""A teacher in host memory on one GPU: what a CPU can't tell, where its weights are and what they take."""

import pytest
import torch
from tiny_models import make_tiny_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_an_offloaded_network_is_on_the_device_block_by_block(tiny_wan, tmp_path):
    from fv_distill.models import Conditioning, WanModel
    from fv_distill.training.sharding import make_accelerator, prepare_frozen

    accelerator = make_accelerator(output_dir=tmp_path)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 3, 4, 4, generator=generator).cuda()
    text = Conditioning(torch.randn(1, 8, 16, generator=generator).cuda(), None)
    outputs, memory = [], []
    for placement in ("auto", "offloaded"):
        network = make_tiny_transformer(num_layers=12, width=384)
        model = WanModel(network, directory=tiny_wan, flow_shift=3.0)
        prepare_frozen(accelerator, model, placement)
        assert model.device.type == "cuda"
        with torch.no_grad():
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                outputs.append(model.predict_velocity(noise, torch.ones(1).cuda(), text).cpu())
        memory.append(torch.cuda.max_memory_allocated())
        on_device = {parameter.device.type for parameter in network.blocks.parameters()}
        assert on_device == ({"cuda"} if placement == "auto" else {"cpu"})
        del model, network
        torch.cuda.empty_cache()
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)
    assert memory[1] < 0.6 * memory[0]
