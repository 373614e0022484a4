import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tiny_models import LATENT_CHANNELS, TEXT_DIM, make_tiny_wan_directory

from fv_distill.data import write_rows

torch.set_num_threads(1)

NUM_ROWS = 6
LATENT_SHAPE = (LATENT_CHANNELS, 3, 4, 4)


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory) -> Path:
    """A Wan pipeline directory with random weights."""
    return make_tiny_wan_directory(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory) -> Path:
    """A directory of six rows with clips of 9 frames at 32 x 32."""
    directory = tmp_path_factory.mktemp("rows")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "id": str(index),
            "file_name": f"{index}.mp4",
            "caption": "a digit",
            "media_type": "video",
            "width": 32,
            "height": 32,
            "num_frames": 9,
            "duration_sec": 1.0,
            "fps": 9.0,
            "vae_latent": torch.randn(LATENT_SHAPE, generator=generator),
            "text_embedding": torch.randn(3 + index % 3, TEXT_DIM, generator=generator),
        }
        for index in range(NUM_ROWS)
    ]
    write_rows(directory / "rows.parquet", rows)
    return directory


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture
def batch() -> dict:
    """Two collated samples, as the loader makes them."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 8, TEXT_DIM, generator=generator)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    return {
        "vae_latent": torch.randn((2, *LATENT_SHAPE), generator=generator),
        "text_embedding": text * mask[..., None],
        "text_mask": mask,
        "caption": ["a digit", "a digit"],
        "caption_dropped": torch.zeros(2, dtype=torch.bool),
        "sample_index": [0, 1],
        "num_bad_rows": 0,
    }
