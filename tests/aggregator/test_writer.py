"""The store's writer: what it returned from is there whatever happens, and no reader ever sees a part of a file."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from eigenwatch.aggregator.writer import StoreWriter
from eigenwatch.schemas import EIGENVALUES, SCHEMA_VERSION, TABLES, table_folder

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KILLS = 20
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


# A parent that forks writers and kills them: forking is quicker than starting, and here no thread runs yet.
KILLED_WRITERS = """
import os, random, signal, sys, time
from eigenwatch.aggregator.writer import StoreWriter
from tests.aggregator.test_writer import spectrum

rows = [spectrum(step, 4000) for step in range(30)]
random.seed(0)
for kill in range(int(sys.argv[2])):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = StoreWriter(sys.argv[1])
        while True:
            path = store.append("eigenvalues", f"run-{kill % 3}", rows)
            os.write(writer, f"{path}\\n".encode())  # from here on it must survive
    os.close(writer)
    said = os.read(reader, 1)  # it is writing
    time.sleep(random.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as rest:
        sys.stdout.write((said + rest.read()).decode())
"""


def test_a_writer_may_be_killed_at_any_moment(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    said = done.stdout.split()
    assert len(said) >= KILLS
    found = {str(path) for path in tmp_path.glob("run_id=*/eigenvalues/part-*.parquet")}
    assert set(said) <= found, "a write that returned is durable"
    for path in found:
        assert pq.read_table(path).num_rows == 30
    for run in range(3):
        folder = table_folder(tmp_path, f"run-{run}", "eigenvalues")
        assert ds.dataset(folder, format="parquet").count_rows() % 30 == 0, "readers pass over what is unfinished"
    unfinished = [path for path in tmp_path.rglob("*") if path.is_file() and str(path) not in found]
    assert all(path.name.startswith(".") for path in unfinished)
