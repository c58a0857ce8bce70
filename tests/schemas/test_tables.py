"""The tables of the store: what a file of theirs says of itself."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eigenwatch.schemas import (
    METRIC_NAMES,
    RECORDS,
    SCHEMA_VERSION,
    STORE_VARIABLE,
    TABLES,
    default_store,
    table_folder,
)

ORDER = ("step", "attempt", "layer", "site", "expert")


@pytest.mark.parametrize("table", TABLES)
def test_every_file_says_which_version_of_the_schema_it_follows(table, tmp_path):
    pq.write_table(TABLES[table].empty_table(), tmp_path / "part.parquet")
    metadata = pq.read_schema(tmp_path / "part.parquet").metadata
    assert metadata[b"eigenwatch_schema_version"] == str(SCHEMA_VERSION).encode()


@pytest.mark.parametrize("table", TABLES)
def test_the_run_stands_in_the_path_and_every_row_says_when_it_was_written(table):
    schema = TABLES[table]
    assert "run_id" not in schema.names
    written_at = schema.field("written_at")
    assert written_at.type == pa.timestamp("us", tz="UTC")
    assert not written_at.nullable


@pytest.mark.parametrize("table", ["records", "eigenvalues", "alerts"])
def test_rows_of_one_record_are_found_by_the_same_columns_in_every_table(table):
    fields = [TABLES[table].field(name) for name in ORDER]
    assert fields == [RECORDS.field(name) for name in ORDER]
    assert [field.name for field in fields if field.nullable] == ["expert"]


def test_every_metric_is_a_column_that_may_be_null():
    for name in METRIC_NAMES:
        assert RECORDS.field(name) == pa.field(name, pa.float64()), name


def test_a_question_about_ranks_reads_no_spectrum():
    assert [name for name, schema in TABLES.items() if "eigenvalues" in schema.names] == ["eigenvalues"]


def test_where_the_files_of_a_table_lie():
    assert table_folder("/data/runs", "llama", "records").as_posix() == "/data/runs/run_id=llama/records"


@pytest.mark.parametrize(("value", "store"), [("/data", "/data"), ("", "eigenwatch-store"), (None, "eigenwatch-store")])
def test_the_store_is_what_the_environment_says_or_a_folder_here(monkeypatch, value, store):
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(STORE_VARIABLE, value)
    assert default_store() == store
