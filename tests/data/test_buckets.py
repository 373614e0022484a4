"""Data sets of several shapes: no batch mixes them, whatever its split, and nothing is lost or repeated."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fv_distill.data.buckets import batch_of_step, group_rows
from fv_distill.data.loader import BatchPlan, build_loader
from fv_distill.data.parquet import ParquetDataset
from fv_distill.data.schema import DataError, write_rows

SHAPES = [(2, 3, 2, 2), (2, 3, 2, 4), (2, 2, 4, 2)]
COUNTS = [11, 5, 2]


def make_row(number: int, shape=SHAPES[0]):
    return {
        "vae_latent": torch.full(shape, float(number)),
        "text_embedding": torch.ones(1 + number % 3, 5),
        "caption": f"clip {number}",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of three shapes, interleaved."""
    folder = tmp_path_factory.mktemp("mixed")
    shapes = [SHAPES[0]] * COUNTS[0]
    for position, shape in zip((1, 3, 5, 7, 9, 0, 12), [SHAPES[1]] * COUNTS[1] + [SHAPES[2]] * COUNTS[2], strict=True):
        shapes.insert(position, shape)
    write_rows(folder / "rows.parquet", [make_row(number, shape) for number, shape in enumerate(shapes)])
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return ParquetDataset(folder / "rows.parquet", cache_dir=folder / "cache")


def make_plan(dataset, *, micro=2, accumulation=1, world=1, rank=0, seed=0):
    return BatchPlan(
        seed=seed,
        num_rows=len(dataset),
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        world_size=world,
        rank=rank,
        buckets=dataset.buckets,
    )


def global_batch(dataset, step, **split):
    world = split.get("world", 1)
    batches = [make_plan(dataset, **split, rank=rank).micro_batches(step) for rank in range(world)]
    return [pair for rank in batches for micro in rank for pair in micro]


def test_buckets_are_the_rows_of_each_shape_as_they_come_first(dataset):
    assert [len(rows) for rows in dataset.buckets] == [2, 11, 5]
    assert sorted(row for rows in dataset.buckets for row in rows) == list(range(18))
    for rows in dataset.buckets:
        assert len({dataset[int(row)]["vae_latent"].shape for row in rows}) == 1


def test_one_shape_is_one_bucket_in_the_order_it_always_had(tmp_path):
    write_rows(tmp_path / "a.parquet", [make_row(number) for number in range(7)])
    dataset = ParquetDataset(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    assert [rows.tolist() for rows in dataset.buckets] == [list(range(7))]
    plain = BatchPlan(seed=3, num_rows=7, micro_batch_size=3, accumulation_steps=1, world_size=1, rank=0)
    for step in range(10):
        assert make_plan(dataset, micro=3, seed=3).micro_batches(step) == plain.micro_batches(step)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 25])
def test_every_row_is_seen_equally_often(dataset, batch_size):
    """After e epochs each bucket has had all its full batches: rows of one bucket differ by one at most."""
    epochs = 50
    steps = sum(epochs * len(rows) // batch_size for rows in dataset.buckets)
    seen = Counter(row for step in range(steps) for row, _ in global_batch(dataset, step, micro=batch_size))
    for rows in dataset.buckets:
        counts = [seen[int(row)] for row in rows]
        assert max(counts) - min(counts) <= 1 and sum(counts) == epochs * len(rows) // batch_size * batch_size


def test_no_batch_mixes_shapes_and_all_shapes_take_turns(dataset):
    plan = make_plan(dataset, micro=2, accumulation=2)
    loader = build_loader(
        dataset, plan, start_step=0, num_steps=30, text_length=4, caption_dropout=0.0, seed=0, num_workers=0
    )
    shapes = [{tuple(batch["vae_latent"].shape) for batch in micro_batches} for micro_batches in loader]
    assert all(len(found) == 1 for found in shapes)
    counts = Counter(shape[1:] for found in shapes for shape in found)
    assert counts.keys() == set(SHAPES) and counts[SHAPES[0]] > counts[SHAPES[1]] > counts[SHAPES[2]]
    # Buckets don't come in blocks.
    assert len({next(iter(found)) for found in shapes[:6]}) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(dataset, num_workers):
    """All that a batch holds, texts that were dropped too, is what it would have been without the break."""
    assert sum(len(rows) // 2 for rows in dataset.buckets) == 8, "steps 3 and 13 are inside of epochs"

    def batches(start, count):
        plan = make_plan(dataset, micro=1, accumulation=2)
        options = {"text_length": 4, "caption_dropout": 0.5, "seed": 3, "num_workers": num_workers}
        loader = build_loader(dataset, plan, start_step=start, num_steps=count, **options)
        return [micro for micro_batches in loader for micro in micro_batches]

    whole = batches(0, 20)
    for start in (3, 13):
        rest = batches(start, 20 - start)
        assert len(rest) == 2 * (20 - start)
        for expected, found in zip(whole[2 * start :], rest, strict=True):
            assert expected.keys() == found.keys() and expected["caption"] == found["caption"]
            tensors = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
            assert "vae_latent" in tensors and "text_embedding" in tensors
            assert all(torch.equal(expected[name], found[name]) for name in tensors)


@pytest.mark.parametrize("split", [(12, 1, 1), (1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 1, 4)])
def test_a_global_batch_does_not_depend_on_its_split(dataset, split):
    micro, accumulation, world = split
    for step in (0, 1, 17, 400):
        whole = global_batch(dataset, step, micro=12)
        assert [index for _, index in whole] == list(range(12))
        assert global_batch(dataset, step, micro=micro, accumulation=accumulation, world=world) == whole


def test_steps_are_a_function_of_the_seed(dataset):
    order = [global_batch(dataset, step) for step in range(40)]
    assert [global_batch(dataset, step) for step in reversed(range(40))] == order[::-1]
    assert [global_batch(dataset, step, seed=1) for step in range(40)] != order


def test_batches_of_a_bucket_come_once_each():
    sizes, batch_size = (7, 30, 1), 4
    # Forty epochs: 70, 300 and 10 batches.
    taken = [batch_of_step(step, seed=5, bucket_sizes=sizes, batch_size=batch_size) for step in range(380)]
    assert sorted(taken) == [(bucket, n) for bucket, count in enumerate((70, 300, 10)) for n in range(count)]
    # Not sorted within an epoch, but never a whole epoch early.
    assert taken != sorted(taken) and taken.index((1, 299)) > 380 * 38 // 40


def test_a_far_step_costs_no_more_than_the_first():
    """A resumed run must not replay a million steps; here that would never end."""
    bucket, batch = batch_of_step(10**12, seed=0, bucket_sizes=(1000, 10), batch_size=8)
    assert batch > 10**8 and bucket in (0, 1)


def test_a_bad_row_is_replaced_by_one_of_its_shape(tmp_path):
    rows = [make_row(0), make_row(1, SHAPES[1]), make_row(2), make_row(3, SHAPES[1])]
    rows[1]["vae_latent"][0, 0, 0, 0] = float("nan")
    write_rows(tmp_path / "a.parquet", rows)
    dataset = ParquetDataset(tmp_path / "a.parquet", on_bad_row="skip", cache_dir=tmp_path / "cache")
    row = dataset.read(1)
    assert row.replaced and row.scalars["caption"] == "clip 3"


def test_a_row_that_contradicts_itself_is_no_bucket_of_its_own(tmp_path):
    write_rows(tmp_path / "a.parquet", [make_row(0), make_row(1, SHAPES[1]), make_row(2)])
    table = pq.read_table(tmp_path / "a.parquet")
    index = table.schema.get_field_index("vae_latent_shape")
    shapes = [*table["vae_latent_shape"].to_pylist()[:2], [2, 9, 9, 9]]
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array(shapes)), tmp_path / "a.parquet")
    dataset = ParquetDataset(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    assert [rows.tolist() for rows in dataset.buckets] == [[0, 2], [1]]
    with pytest.raises(DataError, match=r"row 2, column vae_latent: .* bytes are stored, but shape \[2, 9, 9, 9\]"):
        dataset[2]


def test_repeats_are_in_their_buckets(folder, tmp_path):
    write_rows(tmp_path / "b.parquet", [make_row(0), make_row(1, SHAPES[2])])
    paths = {str(folder / "rows.parquet"): 1, str(tmp_path / "b.parquet"): 3}
    dataset = ParquetDataset(paths, cache_dir=tmp_path / "cache")
    assert [len(rows) for rows in dataset.buckets] == [2 + 3, 11 + 3, 5]


def test_group_rows():
    assert [rows.tolist() for rows in group_rows("abacb")] == [[0, 2], [1, 4], [3]]
