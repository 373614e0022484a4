"""Rows for networks that read no text: an empty text, or none of its columns."""

import pyarrow.parquet as pq
import pytest
import torch

from fv_distill.data import ParquetDataset, write_rows
from fv_distill.data.loader import BatchPlan, build_loader
from fv_distill.data.schema import DataError, ParquetSchemaError


@pytest.fixture(params=["empty", "without columns"])
def directory(request, tmp_path):
    rows = [
        {"caption": "", "text_embedding": None, "keyboard_cond": torch.full((5, 3), float(index))} for index in range(3)
    ]
    path = tmp_path / "rows" / "rows.parquet"
    write_rows(path, rows)
    if request.param == "without columns":
        # As FastVideo's preprocessing for Matrix-Game 2 writes them.
        table = pq.read_table(path)
        pq.write_table(table.select([name for name in table.column_names if not name.startswith("text")]), path)
    return path.parent


def test_they_are_read_and_batched_where_no_text_is_required(directory):
    dataset = ParquetDataset(directory, required=())
    assert dataset.tensors == ["keyboard_cond"]
    plan = BatchPlan(seed=0, num_rows=3, micro_batch_size=2, accumulation_steps=1, world_size=1, rank=0)
    loader = build_loader(
        dataset, plan, start_step=0, num_steps=1, text_length=4, caption_dropout=0.0, seed=0, num_workers=0
    )
    [[batch]] = list(loader)
    assert "text_embedding" not in batch and "text_mask" not in batch
    assert batch["keyboard_cond"].shape == (2, 5, 3)


def test_they_are_refused_where_it_is(directory):
    with pytest.raises((DataError, ParquetSchemaError), match="text_embedding"):
        ParquetDataset(directory)
