"""Reading data sets, and what bad rows lead to."""

import math
import multiprocessing
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fv_distill.data.parquet import ParquetDataset
from fv_distill.data.schema import DataError, ParquetSchemaError, write_rows

LATENT_SHAPE = (2, 3, 2, 2)


def make_row(number: int, **changes):
    latent = torch.full(LATENT_SHAPE, float(number))
    text = torch.full((1 + number % 3, 4), float(number))
    return {"vae_latent": latent, "text_embedding": text, "caption": f"clip {number}", "num_frames": 9} | changes


@pytest.fixture
def open_dataset(tmp_path):
    def open_it(data_path, **kwargs):
        return ParquetDataset(data_path, cache_dir=tmp_path / "cache", **kwargs)

    return open_it


@pytest.fixture
def folder(tmp_path):
    """Two files with the rows 0 to 2 and 3 to 4."""
    write_rows(tmp_path / "rows" / "a.parquet", [make_row(i) for i in range(3)])
    write_rows(tmp_path / "rows" / "deep" / "b.parquet", [make_row(i) for i in range(3, 5)])
    return tmp_path / "rows"


def set_cell(path, row, column, value):
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[row] = value
    index = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type)), path
    )


def captions(dataset):
    return [dataset[i]["caption"] for i in range(len(dataset))]


def test_rows_of_a_directory_in_the_order_of_its_files(folder, open_dataset):
    dataset = open_dataset(folder)
    assert captions(dataset) == [f"clip {i}" for i in range(5)]
    row = dataset[4]
    assert torch.equal(row["vae_latent"], torch.full(LATENT_SHAPE, 4.0))
    assert torch.equal(row["text_embedding"], torch.full((2, 4), 4.0))
    assert row["num_frames"] == 9
    assert dataset.describe(4) == f"{folder / 'deep' / 'b.parquet'}: row 1"
    with pytest.raises(IndexError):
        dataset[5]


def test_single_file(folder, open_dataset):
    assert captions(open_dataset(str(folder / "deep" / "b.parquet"))) == ["clip 3", "clip 4"]


def test_rows_are_writable_copies(folder, open_dataset):
    dataset = open_dataset(folder)
    dataset[1]["vae_latent"].fill_(7.0)
    assert torch.equal(dataset[1]["vae_latent"], torch.full(LATENT_SHAPE, 1.0))


def test_repeat_counts(folder, open_dataset):
    dataset = open_dataset({str(folder / "a.parquet"): 1, str(folder / "deep"): 3})
    assert captions(dataset) == ["clip 0", "clip 1", "clip 2"] + ["clip 3", "clip 4"] * 3
    assert dataset.describe(8).endswith("b.parquet: row 1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floating_dtypes_round_trip_to_fp32(tmp_path, open_dataset, dtype):
    latent = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    steps = torch.tensor([999, 2**40])
    pixels = torch.arange(12, dtype=torch.uint8).view(2, 2, 3)
    row = make_row(0, vae_latent=latent, trajectory_timesteps=steps, pil_image=pixels)
    write_rows(tmp_path / "a.parquet", [row])
    read = open_dataset(tmp_path / "a.parquet")[0]
    assert read["vae_latent"].dtype is torch.float32
    assert torch.equal(read["vae_latent"], latent.float())
    assert torch.equal(read["trajectory_timesteps"], steps)
    assert torch.equal(read["pil_image"], pixels)


def test_large_finite_values_are_fine(tmp_path, open_dataset):
    write_rows(tmp_path / "a.parquet", [make_row(0, vae_latent=torch.full(LATENT_SHAPE, 65504.0).half())])
    assert open_dataset(tmp_path / "a.parquet")[0]["vae_latent"].max() == 65504


def test_a_value_beyond_the_batch_s_precision_is_not_finite(tmp_path, open_dataset):
    write_rows(tmp_path / "a.parquet", [make_row(0, vae_latent=torch.full(LATENT_SHAPE, 1e300, dtype=torch.float64))])
    with pytest.raises(DataError, match="not finite"):
        open_dataset(tmp_path / "a.parquet")


def test_text_only_rows(tmp_path, open_dataset):
    """Without the columns of latents, and with them but empty."""
    text_row = {"text_embedding": torch.ones(2, 4), "caption": "a"}
    write_rows(tmp_path / "without.parquet", [text_row])
    write_rows(tmp_path / "empty.parquet", [text_row | {"vae_latent": None}])
    for name in ("without", "empty"):
        dataset = open_dataset(tmp_path / f"{name}.parquet")
        assert dataset.tensors == ["text_embedding"]
        assert set(dataset[0]) == {"text_embedding", "caption"}
    with pytest.raises(ParquetSchemaError, match="vae_latent_bytes"):
        open_dataset(tmp_path / "without.parquet", tensors=["vae_latent"])
    with pytest.raises(DataError, match=r"empty.parquet has no vae_latent"):
        open_dataset(tmp_path / "empty.parquet", tensors=["vae_latent"])


def test_only_the_wanted_tensors_are_read(tmp_path, open_dataset):
    write_rows(tmp_path / "a.parquet", [make_row(0, clip_feature=torch.tensor([math.nan]))])
    assert open_dataset(tmp_path / "a.parquet", tensors=["vae_latent"]).tensors == ["text_embedding", "vae_latent"]
    with pytest.raises(ValueError, match=r"\['latent'\]"):
        open_dataset(tmp_path / "a.parquet", tensors=["latent"])


def test_rows_with_and_without_latents_do_not_mix(tmp_path, open_dataset):
    write_rows(tmp_path / "a.parquet", [make_row(0), make_row(1, vae_latent=None)])
    dataset = open_dataset(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: row 1, column vae_latent: it is empty, but .*a.parquet: row 0"):
        dataset[1]
    assert torch.equal(open_dataset(tmp_path / "a.parquet", tensors=[])[1]["text_embedding"], torch.ones(2, 4))


def test_data_sets_with_and_without_latents_do_not_mix(tmp_path, open_dataset):
    write_rows(tmp_path / "a.parquet", [make_row(0)])
    write_rows(tmp_path / "b.parquet", [{"text_embedding": torch.ones(2, 4), "caption": "a"}])
    both = {str(tmp_path / "a.parquet"): 1, str(tmp_path / "b.parquet"): 1}
    with pytest.raises(DataError, match=r"data_path: .*b.parquet has no vae_latent.*a.parquet has it"):
        open_dataset(both)
    assert len(open_dataset(both, tensors=[])) == 2


BAD_CELLS = {
    "truncated": ("vae_latent_bytes", bytes(95), "95 bytes are stored, but shape .* takes 96"),
    "no bytes": ("vae_latent_bytes", b"", "0 bytes are stored"),
    "null bytes": ("vae_latent_bytes", None, "0 bytes are stored"),
    "other channels": ("vae_latent_shape", [3, 2, 4, 1], r"\[3, 2, 4, 1\] differs from \[2, 3, 2, 2\] of .*row 0"),
    "wrong ndim": ("vae_latent_shape", [2, 3, 4], "3 dimensions instead of 4"),
    "negative size": ("vae_latent_shape", [-2, -3, 2, 2], "not positive"),
    "unknown dtype": ("vae_latent_dtype", "float33", "'float33' is unknown"),
    "not finite": ("vae_latent_bytes", bytes(92) + b"\x00\x00\xc0\x7f", "not finite"),
    "infinite": ("vae_latent_bytes", bytes(92) + b"\x00\x00\x80\xff", "not finite"),
    "no text": ("text_embedding_bytes", b"", "0 bytes are stored"),
    "other text width": ("text_embedding_shape", [2, 2], "differs from"),
    "no caption": ("caption", None, "no text"),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_bad_row_is_named_and_can_be_skipped(folder, open_dataset, case):
    column, value, problem = BAD_CELLS[case]
    set_cell(folder / "deep" / "b.parquet", 0, column, value)
    dataset = open_dataset(folder)
    shown = column.removesuffix("_bytes").removesuffix("_shape").removesuffix("_dtype")
    with pytest.raises(DataError, match=f"b.parquet: row 0, column {shown}: .*{problem}.*on_bad_row: skip"):
        dataset[3]

    skipping = open_dataset(folder, on_bad_row="skip")
    assert captions(skipping) == ["clip 0", "clip 1", "clip 2", "clip 4", "clip 4"]
    assert [skipping.read(i).replaced for i in range(5)] == [False, False, False, True, False]


def test_replacement_wraps_around_and_stays_in_its_data_set(folder, open_dataset):
    set_cell(folder / "deep" / "b.parquet", 1, "vae_latent_bytes", b"x")
    paths = {str(folder / "deep"): 2, str(folder / "a.parquet"): 1}
    assert captions(open_dataset(paths, on_bad_row="skip")) == ["clip 3"] * 4 + ["clip 0", "clip 1", "clip 2"]


def test_shapes_are_compared_with_the_first_good_row(folder, open_dataset):
    set_cell(folder / "a.parquet", 0, "vae_latent_bytes", b"x")
    with pytest.raises(DataError, match=r"a.parquet: row 0, column vae_latent"):
        open_dataset(folder)
    assert captions(open_dataset(folder, on_bad_row="skip"))[:2] == ["clip 1", "clip 1"]


def test_all_rows_bad(tmp_path, open_dataset):
    write_rows(tmp_path / "a.parquet", [make_row(0, vae_latent=torch.full(LATENT_SHAPE, math.nan))] * 2)
    with pytest.raises(DataError, match=r"every row of .*a.parquet is bad"):
        open_dataset(tmp_path / "a.parquet", on_bad_row="skip")


def test_paths_that_hold_nothing(tmp_path, folder, open_dataset):
    with pytest.raises(FileNotFoundError, match=r"training.data.data_path: .*nowhere does not exist"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"training.data.data_path: .*empty is an empty data set"):
        open_dataset(tmp_path / "empty")
    table = pq.read_table(folder / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "empty" / "none.parquet")
    with pytest.raises(DataError, match="1 parquet files have no rows"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(DataError, match="names no data set"):
        open_dataset({})


def test_file_without_rows_beside_others(folder, open_dataset):
    pq.write_table(pq.read_table(folder / "a.parquet").slice(0, 0), folder / "0.parquet")
    dataset = open_dataset(folder)
    assert captions(dataset) == [f"clip {i}" for i in range(5)]
    assert dataset.describe(0).endswith("a.parquet: row 0")


@pytest.mark.parametrize("repeat", [0, -1, 1.5, True, "2"])
def test_repeat_counts_are_checked(folder, open_dataset, repeat):
    with pytest.raises(ValueError, match=r"training.data.data_path: .*repeat count"):
        open_dataset({str(folder): repeat})


def test_unknown_policy(folder, open_dataset):
    with pytest.raises(ValueError, match=r"training.data.on_bad_row: 'ignore'"):
        open_dataset(folder, on_bad_row="ignore")


def test_damaged_content_names_the_file(folder, open_dataset):
    path = folder / "deep" / "b.parquet"
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(ParquetSchemaError, match=r"b.parquet is damaged"):
        open_dataset(folder)


def test_rewritten_file_is_read_anew(folder, open_dataset):
    assert captions(open_dataset(folder / "a.parquet")) == ["clip 0", "clip 1", "clip 2"]
    write_rows(folder / "a.parquet", [make_row(i) for i in range(5, 8)])
    assert captions(open_dataset(folder / "a.parquet")) == ["clip 5", "clip 6", "clip 7"]


def test_names_are_not_patterns(tmp_path, open_dataset):
    write_rows(tmp_path / "run[1]" / "a*.parquet", [make_row(1)])
    write_rows(tmp_path / "run[1]" / "ab.parquet", [make_row(2)])
    assert captions(open_dataset(tmp_path / "run[1]" / "a*.parquet")) == ["clip 1"]


def test_other_writers_types(folder, open_dataset):
    """binary with 32-bit offsets, 32-bit shapes, a column of only None, columns in another order."""
    table = pq.read_table(folder / "deep" / "b.parquet")
    types = {"vae_latent_bytes": pa.binary(), "vae_latent_shape": pa.list_(pa.int32()), "num_frames": pa.int32()}
    table = table.cast(pa.schema([(f.name, types.get(f.name, f.type)) for f in table.schema]))
    pq.write_table(table.select(table.column_names[::-1]), folder / "deep" / "b.parquet")
    dataset = open_dataset(folder)
    assert captions(dataset) == [f"clip {i}" for i in range(5)]
    assert torch.equal(dataset[3]["vae_latent"], torch.full(LATENT_SHAPE, 3.0))


def test_pickled_dataset_is_small_and_reads_the_same(tmp_path, open_dataset):
    write_rows(tmp_path / "a.parquet", [make_row(i, vae_latent=torch.full((2, 3, 64, 64), float(i))) for i in range(8)])
    dataset = open_dataset(tmp_path / "a.parquet")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 100_000 < 8 * 2 * 3 * 64 * 64 * 4
    assert torch.equal(pickle.loads(pickled)[5]["vae_latent"], dataset[5]["vae_latent"])


def _count_rows(folder, cache, results):
    results.put((os.getpid(), len(ParquetDataset(folder, cache_dir=cache))))


def test_processes_that_start_together_share_the_cache(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_count_rows, args=(folder, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60)[1] for _ in processes] == [5, 5, 5]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1


def test_reading_needs_no_network(folder, open_dataset, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("reading a data set opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert len(open_dataset(folder)) == 5
