"""Which rows a step takes, and what its micro-batches hold."""

import math

import pytest
import torch

from fv_distill.data.loader import BatchMemory, BatchPlan, build_loader
from fv_distill.data.parquet import ParquetDataset
from fv_distill.data.schema import DataError, write_rows
from fv_distill.rng import SampleRng

NUM_ROWS = 7
TEXT_LENGTH = 4
LATENT_SHAPE = (2, 3, 2, 2)


def make_row(number: int, **changes):
    return {
        "vae_latent": torch.full(LATENT_SHAPE, float(number)).half(),
        "text_embedding": torch.full((1 + number % 3, 5), float(number)),
        "clip_feature": torch.full((2,), float(number)),
        "caption": f"clip {number}",
    } | changes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    write_rows(folder / "a.parquet", [make_row(i) for i in range(NUM_ROWS)])
    return ParquetDataset(folder / "a.parquet", cache_dir=folder / "cache")


def make_plan(micro=2, accumulation=1, world=1, rank=0, num_rows=NUM_ROWS, seed=0):
    return BatchPlan(
        seed=seed,
        num_rows=num_rows,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        world_size=world,
        rank=rank,
    )


def load(dataset, plan, *, start=0, steps=5, dropout=0.0, workers=0, text_length=TEXT_LENGTH, seed=0):
    loader = build_loader(
        dataset,
        plan,
        start_step=start,
        num_steps=steps,
        text_length=text_length,
        caption_dropout=dropout,
        seed=seed,
        num_workers=workers,
    )
    assert len(loader) == steps
    return list(loader)


def global_batch(step, **split):
    """The (row, index) pairs of one step over all ranks and micro-batches."""
    world = split.get("world", 1)
    batches = [make_plan(**split, rank=rank).micro_batches(step) for rank in range(world)]
    return [pair for rank in batches for micro in rank for pair in micro]


def assert_equal_batches(left, right):
    assert len(left) == len(right)
    for a, b in zip((m for step in left for m in step), (m for step in right for m in step), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def test_every_row_once_an_epoch_in_changing_order():
    rows = [row for step in range(NUM_ROWS * 2) for row, _ in global_batch(step, micro=3)]
    epochs = [rows[i : i + NUM_ROWS] for i in range(0, len(rows), NUM_ROWS)]
    assert len(epochs) == 6
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_depends_on_the_seed_alone():
    order = [global_batch(step, num_rows=100, micro=10) for step in range(10)]
    assert [global_batch(step, num_rows=100, micro=10) for step in reversed(range(10))] == order[::-1]
    assert [global_batch(step, num_rows=100, micro=10, seed=1) for step in range(10)] != order


@pytest.mark.parametrize("split", [(12, 1, 1), (1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 1, 4), (1, 4, 3)])
def test_a_global_batch_does_not_depend_on_its_split(split):
    micro, accumulation, world = split
    for step in (0, 1, 17):
        whole = global_batch(step, micro=12)
        assert [index for _, index in whole] == list(range(12))
        assert global_batch(step, micro=micro, accumulation=accumulation, world=world) == whole


def test_batch_larger_than_the_data_set():
    (batch,) = make_plan(micro=2 * NUM_ROWS + 1).micro_batches(0)
    rows = [row for row, _ in batch]
    assert sorted(rows[: 2 * NUM_ROWS]) == sorted([*range(NUM_ROWS)] * 2)
    assert [index for _, index in batch] == list(range(2 * NUM_ROWS + 1))


def test_batches_hold_the_rows_of_the_plan(dataset):
    plan = make_plan(micro=2, accumulation=2, world=2, rank=1)
    for step, micro_batches in enumerate(load(dataset, plan)):
        assert len(micro_batches) == 2
        for batch, pairs in zip(micro_batches, plan.micro_batches(step), strict=True):
            rows = [row for row, _ in pairs]
            assert batch["sample_index"] == [index for _, index in pairs]
            assert batch["caption"] == [f"clip {row}" for row in rows]
            assert batch["num_bad_rows"] == 0
            numbers = torch.tensor(rows, dtype=torch.float32)
            assert batch["vae_latent"].dtype is torch.float32
            assert torch.equal(batch["vae_latent"], numbers.view(2, 1, 1, 1, 1).expand(2, *LATENT_SHAPE))
            assert torch.equal(batch["clip_feature"], numbers[:, None].expand(2, 2))
            lengths = torch.tensor([1 + row % 3 for row in rows])
            assert batch["text_mask"].dtype is torch.bool
            assert torch.equal(batch["text_mask"].sum(1), lengths)
            assert torch.equal(batch["text_mask"], torch.arange(TEXT_LENGTH).lt(lengths[:, None]))
            text = numbers[:, None, None] * batch["text_mask"][:, :, None]
            assert torch.equal(batch["text_embedding"], text.expand(2, TEXT_LENGTH, 5))


def test_resuming_gives_the_tail(dataset):
    plan = make_plan(micro=2, accumulation=2)
    whole = load(dataset, plan, steps=6, dropout=0.5)
    assert_equal_batches(load(dataset, plan, start=4, steps=2, dropout=0.5), whole[4:])
    assert load(dataset, plan, start=6, steps=0) == []


def test_workers_give_the_same_batches(dataset):
    plan = make_plan(micro=2, accumulation=2)
    whole = load(dataset, plan, dropout=0.5)
    assert_equal_batches(load(dataset, plan, dropout=0.5, workers=2), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_untouched(dataset, workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(dataset, make_plan(), dropout=0.5, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_that_are_kept_are_not_overwritten(dataset):
    """Their memory is reused, but only once nobody refers to it, be it through a view."""
    plan = make_plan(micro=3)
    kept, views, copies = [], [], []
    for (batch,) in build_loader(
        dataset, plan, start_step=0, num_steps=6, text_length=TEXT_LENGTH, caption_dropout=0.0, seed=0
    ):
        copies.append(batch["vae_latent"].clone())
        kept.append(batch["vae_latent"]) if len(kept) < 3 else views.append(batch["vae_latent"][1:].numpy())
    assert torch.equal(torch.stack(kept), torch.stack(copies[:3]))
    assert torch.equal(torch.stack([torch.from_numpy(view) for view in views]), torch.stack(copies[3:])[:, 1:])


def test_memory_of_dropped_batches_is_used_again(dataset):
    loader = build_loader(
        dataset, make_plan(), start_step=0, num_steps=10, text_length=TEXT_LENGTH, caption_dropout=0.0, seed=0
    )
    assert len({batch["vae_latent"].data_ptr() for (batch,) in loader}) <= 3


def test_caption_dropout_has_its_rate_and_belongs_to_the_sample(dataset):
    plan = make_plan(micro=100)
    dropped = torch.stack([batch["caption_dropped"] for (batch,) in load(dataset, plan, steps=10, dropout=0.3)])
    assert abs(dropped.float().mean() - 0.3) < 0.05  # 3.4 standard deviations
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropped[2], SampleRng(0, 3, range(100)).uniform("caption_dropout") < 0.3)

    split = make_plan(micro=10, accumulation=5, world=2, rank=1)
    micro_batches = load(dataset, split, steps=10, dropout=0.3)[4]
    assert torch.equal(torch.cat([batch["caption_dropped"] for batch in micro_batches]), dropped[4, 50:])
    other = torch.stack([batch["caption_dropped"] for (batch,) in load(dataset, plan, steps=10, dropout=0.3, seed=1)])
    assert not torch.equal(other, dropped)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (1.0, True)])
def test_caption_dropout_at_its_ends(dataset, dropout, expected):
    ((batch,),) = load(dataset, make_plan(micro=50), steps=1, dropout=dropout)
    assert batch["caption_dropped"].tolist() == [expected] * 50


def test_replaced_rows_are_counted(tmp_path):
    rows = [make_row(i) for i in range(4)]
    rows[2]["vae_latent"] = torch.full(LATENT_SHAPE, math.nan)
    write_rows(tmp_path / "a.parquet", rows)
    dataset = ParquetDataset(tmp_path / "a.parquet", on_bad_row="skip", cache_dir=tmp_path / "cache")
    ((batch,),) = load(dataset, make_plan(micro=8, num_rows=4), steps=1)
    assert batch["num_bad_rows"] == 2
    assert sorted(batch["caption"]) == ["clip 0"] * 2 + ["clip 1"] * 2 + ["clip 3"] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_row_ends_the_loop_with_a_plain_message(tmp_path, workers):
    write_rows(tmp_path / "a.parquet", [make_row(0), make_row(1, vae_latent=torch.full(LATENT_SHAPE, math.nan))])
    dataset = ParquetDataset(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="row 1, column vae_latent") as caught:
        load(dataset, make_plan(num_rows=2), workers=workers)
    assert "Traceback" not in str(caught.value)


def test_too_long_text_names_the_row_and_the_key(dataset):
    message = r"a.parquet: row [25], column text_embedding: 3 tokens are more than training.data.text_length=2"
    with pytest.raises(DataError, match=message):
        load(dataset, make_plan(micro=7), text_length=2)


def test_unlike_shapes_in_one_batch_name_both_rows(tmp_path):
    write_rows(tmp_path / "a.parquet", [make_row(0)])
    write_rows(tmp_path / "b.parquet", [make_row(1, vae_latent=torch.zeros(2, 3, 2, 4))])
    paths = {str(tmp_path / "a.parquet"): 1, str(tmp_path / "b.parquet"): 1}
    dataset = ParquetDataset(paths, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"\w\.parquet: row 0 and .*\w\.parquet: row 0 are in one batch.*vae_latent"):
        load(dataset, make_plan(num_rows=2))
    assert len(load(dataset, make_plan(num_rows=2, micro=1))) == 5


def test_text_only_batches(tmp_path):
    write_rows(tmp_path / "a.parquet", [{"text_embedding": torch.ones(2, 5), "caption": "a"}])
    dataset = ParquetDataset(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    ((batch,),) = load(dataset, make_plan(num_rows=1), steps=1)
    assert "vae_latent" not in batch
    assert batch["text_embedding"].shape == (2, TEXT_LENGTH, 5)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"dropout": 1.5}, "caption_dropout"), ({"text_length": 0}, "text_length"), ({"workers": -1}, "num_workers")],
)
def test_options_are_checked(dataset, arguments, key):
    with pytest.raises(ValueError, match=f"training.data.{key}"):
        load(dataset, make_plan(), **arguments)


def test_plan_is_checked():
    for changes, key in [({"num_rows": 0}, "data_path"), ({"micro": 0}, "train_batch_size")]:
        with pytest.raises(ValueError, match=f"training.data.{key}"):
            make_plan(**changes)
    with pytest.raises(ValueError, match=r"training.loop.gradient_accumulation_steps"):
        make_plan(accumulation=0)


def test_batches_start_where_torchs_own_tensors_do():
    """At multiples of 64 bytes, whatever the heap looks like: MKL's sums depend on it."""
    memory = BatchMemory()
    kept = [memory.empty((2, size)) for size in range(1, 60)]
    assert {tensor.data_ptr() % 64 for tensor in kept} == {0}
    assert [tuple(tensor.shape) for tensor in kept[:3]] == [(2, 1), (2, 2), (2, 3)]
