import pytest
from sampled_encoders import SampledEncoders

from fv_distill.data import ParquetDataset
from fv_distill.preprocess import PreprocessOptions, preprocess


@pytest.fixture(autouse=True)
def _fresh_encoders():
    SampledEncoders.made.clear()
    SampledEncoders.prompts.clear()


@pytest.fixture
def run(tiny_wan, tmp_path):
    """Preprocess `data` to `tmp_path / "rows"`, with encoders that have no networks."""

    def run_it(data, **options):
        chosen = {
            "model": str(tiny_wan),
            "data": str(data),
            "output": str(tmp_path / "rows"),
            "adapter": "sampled_encoders.SampledModel",
            "num_frames": 5,
            "text_length": 4,
        }
        if not {"buckets", "max_area"} & options.keys():
            chosen["resolution"] = "32x48"
        return preprocess(PreprocessOptions(**{**chosen, **options}))

    return run_it


@pytest.fixture
def read_rows(tmp_path):
    """All rows of `tmp_path / "rows"` by their ids."""

    def read(folder="rows"):
        dataset = ParquetDataset(tmp_path / folder, cache_dir=tmp_path / "cache")
        rows = [dataset[index] for index in range(len(dataset))]
        assert len({row["id"] for row in rows}) == len(rows), "no row is there twice"
        return {row["id"]: row for row in rows}

    return read
