"""The store's writer: what it returned from is there whatever happens, and no reader ever sees a part of a file."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from eigenwatch.aggregator.writer import StoreWriter, UnwritableRows
from eigenwatch.history import open_history
from eigenwatch.schemas import EIGENVALUES, SCHEMA_VERSION, TABLES, table_folder

from tests.history import stored

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KILLS = 200
REPOSITORY = Path(__file__).parents[2]


def spectrum(step: int, width: int = 500) -> dict:
    values = np.random.default_rng(step).random(width).astype(np.float32)
    return {"step": step, "attempt": 0, "layer": 1, "site": "post", "eigenvalues": values, "written_at": NOW}


def test_what_is_appended_is_read(tmp_path):
    writer = StoreWriter(tmp_path / "a" / "store")
    first = Path(writer.append("eigenvalues", "run", [spectrum(1), spectrum(2)]))
    second = Path(writer.append("eigenvalues", "run", [spectrum(3)]))
    folder = table_folder(tmp_path / "a" / "store", "run", "eigenvalues")
    assert sorted(folder.iterdir()) == [first, second], "in the order in which they were written, and nothing else"
    assert all(path.match("part-*.parquet") for path in (first, second))
    table = ds.dataset(folder, format="parquet").to_table().sort_by("step")
    assert table["step"].to_pylist() == [1, 2, 3]
    assert table["expert"].to_pylist() == [None] * 3
    for row, expected in zip(table.to_pylist(), (1, 2, 3), strict=True):
        assert np.array_equal(np.float32(row["eigenvalues"]), spectrum(expected)["eigenvalues"])
        assert row["written_at"] == NOW


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_its_schema_and_says_its_version(tmp_path, table):
    path = StoreWriter(tmp_path).append(table, "run", [])
    schema = pq.read_schema(path)
    assert schema.names == TABLES[table].names
    assert schema.metadata[b"eigenwatch_schema_version"] == str(SCHEMA_VERSION).encode()


def test_spectra_are_stored_smaller_than_they_are(tmp_path):
    falling = [spectrum(step, 4096) | {"eigenvalues": np.arange(1, 4097, dtype=np.float32) ** -1} for step in range(8)]
    path = Path(StoreWriter(tmp_path).append("eigenvalues", "run", falling))
    assert path.stat().st_size < 0.7 * 8 * 4096 * 4
    assert pq.read_schema(path).field("eigenvalues").type == EIGENVALUES.field("eigenvalues").type


def test_runs_are_kept_apart(tmp_path):
    writer = StoreWriter(tmp_path)
    for run in ("a", "b"):
        writer.append("eigenvalues", run, [spectrum(1)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_id=a", "run_id=b"]


@pytest.mark.parametrize("below", ["file/store", "file"])
def test_a_store_that_cannot_be_written_is_refused_in_one_line_with_the_remedy(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.+\): pass another with --store") as refused:
        StoreWriter(tmp_path / below)
    assert str(tmp_path / below) in str(refused.value)
    with pytest.raises(ValueError, match="cannot be written"):
        StoreWriter("/proc/eigenwatch")


def test_a_failed_write_leaves_no_file_and_the_next_one_succeeds(tmp_path):
    writer = StoreWriter(tmp_path)
    (tmp_path / "run_id=run").touch()
    with pytest.raises(OSError, match=r"run_id=run"):
        writer.append("eigenvalues", "run", [spectrum(1)])
    (tmp_path / "run_id=run").unlink()
    path = Path(writer.append("eigenvalues", "run", [spectrum(1)]))
    assert list(path.parent.iterdir()) == [path]


BAD_ROWS = {
    "missing": {},
    "no number": spectrum(1) | {"layer": "first"},
    "too great a number": spectrum(1) | {"step": 1 << 70},
    "too great for its column": spectrum(1) | {"layer": 1 << 40},
    "nothing where something must be": spectrum(1) | {"site": None},
    "no list": spectrum(1) | {"eigenvalues": 3.0},
    "no mapping": None,
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_rows_that_can_never_be_written_are_told_from_a_store_that_refuses(tmp_path, row):
    writer = StoreWriter(tmp_path)
    tables = {"records": [stored.record(1)], "eigenvalues": [spectrum(1), row]}
    with pytest.raises(UnwritableRows, match="rows of eigenvalues that can never be written: "):
        writer.append_tables("run", tables)
    assert list(tmp_path.rglob("*.parquet")) == [], "nothing of any table"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system may not be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_a_refusal_and_leaves_nothing(small_disk):
    writer = StoreWriter(small_disk)
    large = [spectrum(step, 4000) for step in range(30)]
    with pytest.raises(OSError, match="No space left on device"):
        writer.append("eigenvalues", "run", large)
    folder = table_folder(small_disk, "run", "eigenvalues")
    assert list(folder.iterdir()) == []
    assert Path(writer.append("eigenvalues", "run", large[:1])).exists()


# A parent that forks writers and kills them: forking is quicker than starting, and here no thread runs yet.
KILLED_WRITERS = """
import json, os, random, signal, sys, time
from pathlib import Path
import pyarrow.parquet as pq
from eigenwatch.aggregator.writer import StoreWriter, UnwritableRows
from tests.aggregator.test_writer import rows_of_all_tables

store, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
tables = rows_of_all_tables()
read, said, unfinished = {}, 0, set()
for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        appender = StoreWriter(store)
        while True:
            for path in appender.append_tables(f"run-{kill % 3}", tables):
                os.write(writer, f"{path}\\n".encode())  # from here on it must survive
    os.close(writer)
    first = os.read(reader, 1)  # it is writing
    time.sleep(random.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as rest:
        acknowledged = (first + rest.read()).decode().split()
    said += len(acknowledged)
    for path in store.glob("run_id=*/*/part-*.parquet"):
        if path not in read:
            read[path] = pq.ParquetFile(path).read(use_threads=False).num_rows
    assert {Path(path) for path in acknowledged} <= read.keys(), "a write that returned is there"
    unfinished |= {path for path in store.rglob("*") if path.is_file() and path not in read}
tables_of = {str(path.relative_to(store)): rows for path, rows in read.items()}
print(json.dumps({"said": said, "read": tables_of, "unfinished": sorted(path.name for path in unfinished)}))
"""


def rows_of_all_tables() -> dict[str, list[dict]]:
    return {
        "eigenvalues": [spectrum(step, 4000) for step in range(30)],
        "alerts": [stored.alert("a", 3, written=1)],
        "records": [stored.record(step) for step in range(30)],
        "runs": [stored.run(written=0)],
    }


def test_a_writer_may_be_killed_at_any_moment(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=500, cwd=REPOSITORY)
    found = json.loads(done.stdout)
    assert found["said"] >= KILLS
    written = {table: len(rows) for table, rows in rows_of_all_tables().items()}
    assert {table: {rows for path, rows in found["read"].items() if f"/{table}/" in path} for table in written} == {
        table: {rows} for table, rows in written.items()
    }
    assert found["unfinished"], "some were killed in the middle of a file"
    assert all(name.startswith(".") for name in found["unfinished"]), "which readers pass over"
    with open_history(tmp_path) as history:
        for view, table in (("records_raw", "records"), ("alerts", "alerts"), ("runs", "runs")):
            assert history.query(f"FROM {view}").num_rows > 0, table
        (counted,) = history.query("SELECT count(*) AS rows FROM records_raw").to_pylist()
    assert counted["rows"] == sum(rows for path, rows in found["read"].items() if "/records/" in path)
