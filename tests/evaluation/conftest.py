from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from fv_distill.export import StudentInfo, export_diffusers_directory

CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}
SIGMAS = (1.0, 0.6)


def make_export(tiny_wan: Path, directory: Path, *, chunk_size: int | None, sample_type: str = "ode") -> Path:
    """The tiny network as a student of two steps; with a chunk size, one that streams."""
    causal = None
    if chunk_size is not None:
        adapter = "fv_distill.models.wan_causal.CausalWanModel"
        causal = {"adapter": adapter, "chunk_size": chunk_size, "local_window": None, "sink_frames": 0}
        causal["context_noise"] = 0.0
    weights = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer").state_dict()
    info = StudentInfo(str(tiny_wan), "tests", sigmas=SIGMAS, sample_type=sample_type, causal=causal, call=CALL)
    return export_diffusers_directory(directory, weights, info)


@pytest.fixture(scope="session")
def student(tiny_wan, tmp_path_factory):
    """A few-step student that makes a clip at once."""
    return make_export(tiny_wan, tmp_path_factory.mktemp("exports") / "student", chunk_size=None)


@pytest.fixture(scope="session")
def noisy_student(tiny_wan, tmp_path_factory):
    """One that noises afresh between its steps."""
    return make_export(tiny_wan, tmp_path_factory.mktemp("exports") / "sde", chunk_size=None, sample_type="sde")


@pytest.fixture(scope="session")
def streaming_student(tiny_wan, tmp_path_factory):
    """One that streams latent frame by latent frame."""
    return make_export(tiny_wan, tmp_path_factory.mktemp("exports") / "streaming", chunk_size=1)


@pytest.fixture(scope="session")
def one_chunk_student(tiny_wan, tmp_path_factory):
    """One whose only chunk is the whole clip, so that it sees what the stock network sees."""
    return make_export(tiny_wan, tmp_path_factory.mktemp("exports") / "one_chunk", chunk_size=3)
