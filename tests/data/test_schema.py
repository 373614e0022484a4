"""The writer and the check of the parquet schema."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fv_distill.data.schema import ParquetSchemaError, check_schema, parse_dtype, write_rows

ROW = {"text_embedding": torch.zeros(2, 4), "caption": "a", "fps": 16.0, "num_frames": 5}


def write_changed(path: Path, change) -> Path:
    """A good file whose table went through `change`."""
    write_rows(path, [ROW, ROW])
    pq.write_table(change(pq.read_table(path)), path)
    return path


def test_written_columns_are_the_published_ones(tmp_path):
    latent = torch.arange(16, dtype=torch.float32).view(2, 2, 2, 2)
    write_rows(tmp_path / "a.parquet", [ROW | {"vae_latent": latent, "id": "x"}])
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert table == [
        {
            "text_embedding_bytes": bytes(32),
            "text_embedding_shape": [2, 4],
            "text_embedding_dtype": "float32",
            "vae_latent_bytes": np.arange(16, dtype="<f4").tobytes(),
            "vae_latent_shape": [2, 2, 2, 2],
            "vae_latent_dtype": "float32",
            "id": "x",
            "caption": "a",
            "num_frames": 5,
            "fps": 16.0,
        }
    ]
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_tensors_are_stored_contiguously(tmp_path):
    transposed = torch.arange(8, dtype=torch.float32).view(4, 2).T
    write_rows(tmp_path / "a.parquet", [ROW | {"text_embedding": transposed}])
    stored = pq.read_table(tmp_path / "a.parquet")["text_embedding_bytes"][0].as_py()
    assert np.frombuffer(stored, "<f4").tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.parquet"
    write_rows(path, [ROW])
    before = path.read_bytes()

    def rows():
        yield ROW | {"caption": "new"}
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_rows(path, rows())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([ROW | {"latent": torch.zeros(1)}], r"unknown keys \['latent'\]"),
        ([{"caption": "a"}], r"lack \['text_embedding'\]"),
        ([ROW, {"text_embedding": torch.zeros(2, 4), "caption": "a"}], "row 1 has the keys"),
        ([ROW | {"text_embedding": torch.zeros(2, 4, dtype=torch.complex64)}], "complex64 has no name"),
    ],
)
def test_writer_refuses(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "a.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_check_reports_what_the_files_hold(tmp_path):
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_rows(files[0], [ROW | {"vae_latent": torch.zeros(1, 1, 1, 1), "id": "x"}])
    write_rows(files[1], [ROW | {"vae_latent": None}] * 3)
    assert check_schema(files) == (["text_embedding", "vae_latent"], ["caption", "num_frames", "fps"], [1, 3])


def test_missing_column_is_named(tmp_path):
    path = write_changed(tmp_path / "a.parquet", lambda table: table.drop_columns("text_embedding_shape"))
    with pytest.raises(
        ParquetSchemaError, match=r"a.parquet: column 'text_embedding_shape' is missing.*caption"
    ) as caught:
        check_schema([path])
    assert "list<" in str(caught.value)


def test_tensor_that_only_some_files_have_is_an_error(tmp_path):
    write_rows(tmp_path / "a.parquet", [ROW | {"vae_latent": torch.zeros(1, 1, 1, 1)}])
    write_rows(tmp_path / "b.parquet", [ROW])
    with pytest.raises(ParquetSchemaError, match=r"b.parquet: column 'vae_latent_bytes' is missing"):
        check_schema([tmp_path / "a.parquet", tmp_path / "b.parquet"])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text_embedding_bytes", pa.array([[0.0], [1.0]]), "expected large_binary, found list<"),
        ("text_embedding_shape", pa.array([[0.5], [1.0]]), "expected list<.*found list<.*double"),
        ("text_embedding_dtype", pa.array([1, 2]), "expected string, found int64"),
        ("caption", pa.array([1, 2]), "expected string, found int64"),
        ("num_frames", pa.array([1.5, 2.0]), "expected int64, found double"),
    ],
)
def test_ill_typed_column_is_named(tmp_path, column, values, message):
    def change(table):
        return table.set_column(table.schema.get_field_index(column), column, values)

    path = write_changed(tmp_path / "a.parquet", change)
    with pytest.raises(ParquetSchemaError, match=f"a.parquet: column '{column}' has a wrong type: {message}"):
        check_schema([path])


def test_other_writers_types_are_accepted(tmp_path):
    """Other writers store 32-bit integers, binary with 32-bit offsets, whole-number rates and columns of only None."""

    def change(table):
        shapes = pa.array([[2, 4]] * 2, pa.list_(pa.int32()))
        table = table.set_column(1, "text_embedding_shape", shapes).drop_columns(["fps"])
        table = table.append_column("fps", pa.array([16, 24])).append_column("duration_sec", pa.nulls(2))
        return table.append_column("unknown_extra", pa.array(["x", "y"]))

    assert check_schema([write_changed(tmp_path / "a.parquet", change)])[2] == [2]


def test_cut_off_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_rows(path, [ROW])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ParquetSchemaError, match=r"a.parquet is not a readable parquet file"):
        check_schema([path])


def test_dtype_names():
    assert parse_dtype("float16") is torch.float16
    assert parse_dtype("torch.bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match=r"'float8' is unknown.*bfloat16"):
        parse_dtype("float8")
