"""Compaction changes the files of a store and nothing that a query can see, whoever reads, writes or dies meanwhile."""

import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eigenwatch.aggregator.stored import stored_attempts, stored_records
from eigenwatch.history import History, open_history
from eigenwatch.history.compaction import Compacted, CompactionConfig, compact
from eigenwatch.schemas import RECORDS, TABLES, table_folder
from eigenwatch.schemas.parts import is_merged
from eigenwatch.schemas.store import open_store

from tests.history.stored import START, alert, record, run, spectrum, write

VIEWS = ("records", "records_raw", "eigenvalues", "alerts", "runs")
DAY = timedelta(days=1)


def fill(store: Path, steps: int = 8, run_id: str = "r") -> None:
    """As shards would: a file a second, late revisions and a restart among them."""
    write(store, run_id, "runs", run(0, written=0))
    for step in range(steps):
        rows = [(step, layer) for layer in (2, 0, 1)]
        write(store, run_id, "records", *[record(*row, complete=False) for row in rows])
        write(store, run_id, "eigenvalues", *[spectrum(*row) for row in rows])
        write(store, run_id, "alerts", alert(f"a{step % 3}", step, written=step))
    write(store, run_id, "records", record(1, written=50), record(6, attempt=1, written=60))
    write(store, run_id, "eigenvalues", spectrum(1, written=50), spectrum(6, attempt=1, written=60))
    write(store, run_id, "runs", run(0, written=55, status="lost"), run(1, written=60))


def seen(store: Path) -> dict[str, list[str]]:
    with open_history(store) as history:
        return seen_by(history)


def seen_by(history: History) -> dict[str, list[str]]:
    return {view: sorted(map(repr, history.query(f"FROM {view}").to_pylist())) for view in VIEWS}


def parts(store: Path) -> list[Path]:
    return sorted(store.glob("run_id=*/*/part-*.parquet"))


def compacted(store: Path, *, now: datetime = START + DAY, **config: Any) -> Compacted:
    return compact(open_store(store), CompactionConfig(**config), clock=lambda: now)


def test_every_view_shows_the_same_before_and_after_each_step_of_it(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path, run_id="other")
    before = seen(tmp_path)
    assert all(before.values())
    done = compacted(tmp_path)
    assert done == Compacted(merged=56, into=8, waiting=56)
    assert seen(tmp_path) == before
    assert compacted(tmp_path, now=START + 2 * DAY) == Compacted(removed=56)
    assert seen(tmp_path) == before
    assert len(parts(tmp_path)) == 8


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    fill(tmp_path)
    compacted(tmp_path)
    again = compacted(tmp_path)
    assert again == Compacted(waiting=28)
    compacted(tmp_path, now=START + 2 * DAY)
    before = parts(tmp_path)
    assert compacted(tmp_path, now=START + 3 * DAY) == Compacted()
    assert parts(tmp_path) == before


def test_what_is_written_later_is_merged_later(tmp_path: Path) -> None:
    fill(tmp_path)
    for day in range(1, 6):
        write(tmp_path, "r", "records", record(100 * day))
        before = seen(tmp_path)
        done = compacted(tmp_path, now=START + day * DAY)
        assert done.merged == (29 if day == 1 else 2)
        assert seen(tmp_path) == before
    assert len(parts(tmp_path)) == 4 + 2, "the replaced of the last time are still there"


def test_replaced_files_stay_for_queries_under_way_and_no_longer(tmp_path: Path) -> None:
    fill(tmp_path)
    old = parts(tmp_path)
    compacted(tmp_path)
    for minutes, there in ((0, True), (59, True), (60, False)):
        compacted(tmp_path, now=START + DAY + timedelta(minutes=minutes))
        assert all(path.exists() is there for path in old)


def test_more_frequent_compaction_does_not_keep_them_for_ever(tmp_path: Path) -> None:
    fill(tmp_path)
    old = parts(tmp_path)
    for half_hour in range(4):
        write(tmp_path, "r", "records", record(100 + half_hour))
        before = seen(tmp_path)
        compacted(tmp_path, now=START + DAY + half_hour * timedelta(minutes=30))
        assert seen(tmp_path) == before
    assert not any(path.exists() for path in old)


def test_a_merged_part_that_is_merged_again_passes_on_what_it_replaced(tmp_path: Path) -> None:
    """A listing that is not of one moment may miss the first merged part and find what that replaced."""
    fill(tmp_path)
    compacted(tmp_path)
    first = [path for path in parts(tmp_path) if is_merged(path.name)]
    write(tmp_path, "r", "records", record(77))
    before = seen(tmp_path)
    assert compacted(tmp_path, now=START + DAY + timedelta(minutes=5)).merged == 2
    next(path for path in first if path.parent.name == "records").unlink()
    assert seen(tmp_path) == before


def test_a_reader_that_has_listed_the_files_before_goes_on_with_them(tmp_path: Path) -> None:
    fill(tmp_path)
    with open_history(tmp_path) as history:
        before = history.connection.execute("SELECT count(*) FROM records_raw").fetchall()
        compacted(tmp_path)
        compacted(tmp_path, now=START + DAY + timedelta(minutes=59))
        assert history.connection.execute("SELECT count(*) FROM records_raw").fetchall() == before


def test_a_shard_that_starts_again_learns_the_same_from_a_compacted_store(tmp_path: Path) -> None:
    fill(tmp_path)
    store = open_store(tmp_path)

    def known() -> list[Any]:
        return [stored_attempts(store, "r"), *(stored_records(store, "r", attempt) for attempt in (0, 1, 2))]

    before = known()
    assert len(before[1]) == 24
    for day in (1, 2):
        compacted(tmp_path, now=START + day * DAY)
        assert known() == before


def test_rows_lie_by_layer_and_step_so_that_a_question_about_one_skips_the_rest(tmp_path: Path) -> None:
    for step in range(4):
        rows = [spectrum(step, layer, eigenvalues=[1.0] * 300_000) for layer in range(8)]
        write(tmp_path, "r", "eigenvalues", *rows)
        write(tmp_path, "r", "records", *[record(step, layer) for layer in range(8)])
    compacted(tmp_path)
    (path,) = [path for path in parts(tmp_path) if is_merged(path.name) and path.parent.name == "eigenvalues"]
    rows = pq.read_table(path, columns=["layer", "step"]).to_pylist()
    assert rows == [{"layer": layer, "step": step} for layer in range(8) for step in range(4)]
    assert pq.read_metadata(path).num_row_groups > 4
    with open_history(tmp_path) as history:
        plan = history.query("EXPLAIN ANALYZE SELECT count(eigenvalues) FROM eigenvalues WHERE layer = 5").to_pylist()
    assert re.search(r"Row Groups Scanned: [12] / \d", plan[0]["explain_value"])


def test_large_parts_are_left_as_they_are(tmp_path: Path) -> None:
    for step in range(6):
        write(tmp_path, "r", "eigenvalues", spectrum(step, eigenvalues=[float(i) for i in range(1000)]))
    size = pq.read_metadata(parts(tmp_path)[0]).row_group(0).total_byte_size
    assert compacted(tmp_path, part_bytes=2 * size) == Compacted()
    done = compacted(tmp_path, part_bytes=3 * size)
    assert (done.merged, done.into) == (6, 2)


def test_old_spectra_are_dropped_and_their_records_stay(tmp_path: Path) -> None:
    day = DAY.total_seconds()
    for number in range(10):
        rows = [{"step": number, "layer": layer, "written": number * day} for layer in range(2)]
        write(tmp_path, "r", "records", *[record(**row) for row in rows])
        write(tmp_path, "r", "eigenvalues", *[spectrum(**row) for row in rows])
    compacted(tmp_path, now=START + 10 * DAY)
    keep = 4.5 * day
    expected = compacted(tmp_path, now=START + 10 * DAY, keep_eigenvalues_seconds=keep, dry_run=True)
    done = compacted(tmp_path, now=START + 10 * DAY, keep_eigenvalues_seconds=keep)
    assert done == expected
    assert done.spectra_dropped == 12
    with open_history(tmp_path) as history:
        steps = history.query("SELECT DISTINCT step FROM eigenvalues ORDER BY step").column("step").to_pylist()
        assert steps == [6, 7, 8, 9]
        assert history.query("FROM records").num_rows == 20
    compacted(tmp_path, now=START + 30 * DAY, keep_eigenvalues_seconds=keep)
    assert compacted(tmp_path, now=START + 60 * DAY, keep_eigenvalues_seconds=keep).spectra_dropped == 0
    with open_history(tmp_path) as history:
        assert history.query("FROM eigenvalues").num_rows == 0
        assert history.query("FROM records").num_rows == 20


def test_a_dry_run_changes_nothing_and_counts_the_same(tmp_path: Path) -> None:
    fill(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    expected = compacted(tmp_path, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert compacted(tmp_path) == expected


def test_two_at_once_exclude_each_other(tmp_path: Path) -> None:
    fill(tmp_path)
    with open_store(tmp_path).lock() as held:
        assert held
        with pytest.raises(ValueError, match=rf"another compaction of {tmp_path} is under way"):
            compacted(tmp_path)
    assert compacted(tmp_path).merged == 28


def test_two_that_overlapped_without_a_lock_leave_every_row_once(tmp_path: Path) -> None:
    """As they may in an object store: each had listed its files before the other published."""
    store, rival = tmp_path / "store", tmp_path / "rival"
    fill(store)
    shutil.copytree(store, rival)
    late = [write(tmp_path / "late", "r", "records", record(step)) for step in (77, 78)]
    for folder, path in ((store, late[0]), (rival, late[0]), (rival, late[1])):
        shutil.copy(path, table_folder(folder, "r", "records"))
    before = seen(rival)
    compacted(store)
    compacted(rival, now=START + DAY + timedelta(seconds=1))
    shutil.copytree(rival, store, dirs_exist_ok=True)
    assert seen(store) == before
    assert compacted(store, now=START + DAY + timedelta(minutes=30)).merged == 0, "first the loser must go"
    for day in (2, 3, 4):
        compacted(store, now=START + day * DAY)
        assert seen(store) == before
    assert len(parts(store)) == 4


def test_files_of_other_versions_and_damaged_ones_are_left_alone(tmp_path: Path, caplog) -> None:
    fill(tmp_path)
    folder = table_folder(tmp_path, "r", "records")
    older = pa.Table.from_pylist([record(0, layer=9)], schema=RECORDS).drop_columns(["js_divergence"])
    pq.write_table(older, folder / "part-000000-older.parquet")
    (folder / "part-000000-damaged.parquet").write_bytes(b"not parquet at all")
    done = compacted(tmp_path)
    assert done == Compacted(merged=28, into=4, waiting=28, unreadable=1)
    assert "part-000000-damaged.parquet is left alone" in caplog.text
    assert (folder / "part-000000-damaged.parquet").exists()
    compacted(tmp_path, now=START + 2 * DAY)
    (folder / "part-000000-damaged.parquet").unlink()
    with open_history(tmp_path) as history:
        assert history.query("SELECT count(*) AS n FROM records_raw WHERE layer = 9").to_pylist() == [{"n": 1}]


@pytest.mark.parametrize("table", TABLES)
def test_a_store_of_a_newer_version_is_refused_by_whoever_reads(tmp_path: Path, table: str) -> None:
    fill(tmp_path)
    newer = TABLES[table].with_metadata({b"eigenwatch_schema_version": b"2"})
    path = table_folder(tmp_path, "r", table) / "part-999999.parquet"
    pq.write_table(newer.empty_table(), path)
    store = open_store(tmp_path)
    for read in (
        lambda: seen(tmp_path),
        lambda: compacted(tmp_path),
        lambda: stored_records(store, "r", 0),
        lambda: stored_attempts(store, "r"),
    ):
        with pytest.raises(
            ValueError, match=r"\A[^\n]*part-999999\.parquet follows version 2 .*: upgrade eigenwatch\Z"
        ):
            read()


def test_temporary_files_of_dead_writers_are_removed_some_time(tmp_path: Path) -> None:
    fill(tmp_path, steps=1)
    leftover = table_folder(tmp_path, "r", "records") / ".part-1.parquet.tmp"
    leftover.write_bytes(b"PAR1 half")
    written = datetime.fromtimestamp(leftover.stat().st_mtime, tz=START.tzinfo)
    compacted(tmp_path, now=written + timedelta(minutes=59))
    assert leftover.exists()
    compacted(tmp_path, now=written + timedelta(minutes=61))
    assert not leftover.exists()
