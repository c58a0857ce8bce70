"""The coordinator: one attempt a launch, one row for whatever becomes of it, and what a restart takes up of both."""

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from eigenwatch.aggregator.coordinator import Coordinator
from eigenwatch.aggregator.snapshot import RunCounters
from eigenwatch.aggregator.writer import StoreWriter
from eigenwatch.history import open_history
from eigenwatch.schemas import RECORDS, LayerDescription, RunDescription, table_folder
from eigenwatch.schemas.delivery import OPEN_AGAIN

SHARDS = ["shard-0", "shard-1", "shard-2"]
LAYERS = tuple(
    LayerDescription(layer=index, site="post", name=f"h.{index}", width=8, shares=((0,), (1,))) for index in range(5)
)


def launch(launch_id: str, run_id: str = "run", **changes: Any) -> dict[str, Any]:
    run = RunDescription(run_id=run_id, launch_id=launch_id, world_size=2, layers=LAYERS, tags={"norm": "pre"})
    return dataclasses.replace(run, **changes).to_wire()


@pytest.fixture
def coordinator(tmp_path):
    return Coordinator(str(tmp_path), SHARDS)


def rows(store: Path, run_id: str = "run") -> list[dict[str, Any]]:
    """The rows of a run, oldest first."""
    files = table_folder(store, run_id, "runs").glob("part-*.parquet")
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(found, key=lambda row: row["written_at"])


def story(store: Path, run_id: str = "run") -> list[tuple[int, str, str]]:
    return [(row["attempt"], row["launch_id"], row["status"]) for row in rows(store, run_id)]


def running(coordinator: Coordinator) -> list[tuple[str, int]]:
    return [(one.run_id, one.attempt) for one in coordinator.running()]


def finish(coordinator: Coordinator, attempt: int = 0, clean: bool = True) -> None:
    for rank in range(2):
        coordinator.finish("run", attempt, rank, clean, {})


def test_every_rank_of_a_launch_gets_the_same_answer(coordinator, tmp_path):
    first, second = (coordinator.open_run(launch("a")) for _ in range(2))
    assert first == second
    assert first.attempt == 0
    assert first.owners.keys() == {0, 1, 2, 3, 4}
    assert set(first.owners.values()) == set(SHARDS)
    assert story(tmp_path) == [(0, "a", "running")]


def test_both_sites_and_all_experts_of_a_layer_have_one_owner(coordinator):
    described = tuple(
        dataclasses.replace(LAYERS[index], site=site, expert=expert)
        for index in (3, 4)
        for site in ("post", "pre")
        for expert in (None, 0, 1)
    )
    owners = coordinator.open_run(launch("a", layers=described)).owners
    assert owners.keys() == {3, 4}
    assert owners[3] != owners[4]


def test_a_row_says_what_the_run_is(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    (row,) = rows(tmp_path)
    assert row["world_size"] == 2
    assert dict(row["tags"]) == {"norm": "pre"}
    assert row["layers"][4] == {"layer": 4, "site": "post", "expert": None, "name": "h.4", "width": 8}
    assert row["ended_at"] is None
    assert row["started_at"] <= row["written_at"]


def test_each_new_launch_of_a_run_is_a_new_attempt_and_the_newest_is_shown(coordinator, tmp_path):
    assert [coordinator.open_run(launch(name)).attempt for name in "abc"] == [0, 1, 2]
    assert coordinator.open_run(launch("x", run_id="other")).attempt == 0
    assert running(coordinator) == [("run", 2), ("other", 0)]
    assert story(tmp_path) == [(0, "a", "running"), (1, "b", "running"), (2, "c", "running")]
    assert coordinator.ended() == []


def test_a_launch_that_was_replaced_and_falls_silent_is_lost(coordinator, tmp_path, monkeypatch):
    coordinator.open_run(launch("a"))
    coordinator.open_run(launch("b"))
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.REPLACED_SECONDS", -1.0)
    assert running(coordinator) == [("run", 1)]
    assert story(tmp_path)[-1] == (0, "a", "lost")
    assert coordinator.ended() == [("run", 0)]


def test_a_launch_that_ended_and_comes_back_is_running_again(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    finish(coordinator)
    assert coordinator.open_run(launch("a")).attempt == 0
    assert running(coordinator) == [("run", 0)]
    assert coordinator.ended() == []
    assert story(tmp_path)[-1] == (0, "a", "running")


def test_a_restarted_coordinator_knows_the_attempts_from_the_store(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    coordinator.open_run(launch("b"))
    again = Coordinator(str(tmp_path), SHARDS)
    assert not again.heartbeat("run", 2, 0, {})
    here, there = again.open_run(launch("b")), coordinator.open_run(launch("b"))
    assert (here.attempt, here.owners) == (there.attempt, there.owners)
    assert again.heartbeat("run", 1, 0, {})
    assert again.open_run(launch("c")).attempt == 2


def test_a_folder_without_a_file_does_not_stop_a_run(coordinator, tmp_path):
    (tmp_path / "run_id=run" / "runs").mkdir(parents=True)
    assert coordinator.open_run(launch("a")).attempt == 0


def test_a_launch_is_finished_when_its_last_rank_has_closed(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    coordinator.finish("run", 0, 1, True, {})
    coordinator.finish("run", 0, 1, True, {})
    assert running(coordinator) == [("run", 0)]
    coordinator.finish("run", 0, 0, True, {})
    assert running(coordinator) == []
    assert coordinator.ended() == [("run", 0)]
    opened, *_, closed = rows(tmp_path)
    assert closed["status"] == "finished"
    assert closed["ended_at"] >= closed["started_at"] == opened["started_at"]
    assert closed["written_at"] > opened["written_at"]


def test_a_launch_of_which_a_rank_died_is_lost(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    coordinator.finish("run", 0, 0, False, {})
    coordinator.finish("run", 0, 1, True, {})
    assert story(tmp_path)[-1] == (0, "a", "lost")


def test_a_launch_after_one_that_ended_is_a_new_attempt(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    finish(coordinator)
    assert coordinator.open_run(launch("b")).attempt == 1
    assert story(tmp_path) == [(0, "a", "running"), (0, "a", "finished"), (1, "b", "running")]


def test_losses_are_the_sum_over_ranks_of_what_each_said_last(coordinator):
    coordinator.open_run(launch("a"))
    coordinator.heartbeat("run", 0, 0, {"outbox_full": 1})
    coordinator.heartbeat("run", 0, 0, {"outbox_full": 3})
    coordinator.heartbeat("run", 0, 1, {"outbox_full": 2, "spool_error": 1})
    (state,) = coordinator.running()
    assert state.dropped == {"outbox_full": 5, "spool_error": 1}
    assert (state.world_size, state.layers) == (2, 5)
    coordinator.finish("run", 0, 1, True, {"outbox_full": 4})
    assert coordinator.running()[0].dropped == {"outbox_full": 7, "spool_error": 1}, "it never falls"


def test_news_of_a_launch_that_nobody_knows_is_ignored(coordinator, tmp_path):
    coordinator.heartbeat("run", 0, 0, {})
    coordinator.finish("run", 3, 0, True, {})
    assert running(coordinator) == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_name_is_not_allowed_is_not_opened(coordinator, tmp_path):
    with pytest.raises(ValueError, match="run_id"):
        coordinator.open_run(launch("a") | {"run_id": "../elsewhere"})
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_refuses_a_row_does_not_stop_the_run(coordinator, tmp_path, caplog):
    (tmp_path / "run_id=run").touch()
    assert coordinator.open_run(launch("a")).attempt == 0
    assert "could not be written" in caplog.text
    assert running(coordinator) == [("run", 0)]


def test_a_launch_of_which_nobody_was_heard_for_long_is_lost(coordinator, tmp_path, monkeypatch):
    coordinator.open_run(launch("a"))
    coordinator.heartbeat("run", 0, 0, {})
    assert running(coordinator) == [("run", 0)]
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.LOST_SECONDS", -1.0)
    assert running(coordinator) == []
    assert coordinator.ended() == [("run", 0)]
    assert story(tmp_path)[-1] == (0, "a", "lost")


def restarted(store: Path) -> Coordinator:
    return Coordinator(str(store), SHARDS)


def test_what_was_under_way_is_known_at_once_after_a_restart(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    finish(coordinator)
    coordinator.open_run(launch("b"))
    coordinator.open_run(launch("x", run_id="other"))
    again = restarted(tmp_path)
    assert running(again) == [("other", 0), ("run", 1)]
    assert [(one.world_size, one.layers, one.heard) for one in again.running()] == [(2, 5, False)] * 2
    assert again.heartbeat("run", 1, 0, {})
    assert again.open_run(launch("x", run_id="other")).owners.keys() == {0, 1, 2, 3, 4}
    assert [one.heard for one in again.running()] == [True, True]
    finish(again, 1)
    assert running(again) == [("other", 0)]
    assert story(tmp_path)[-1] == (1, "b", "finished")
    assert rows(tmp_path)[-1]["started_at"] == rows(tmp_path)[2]["started_at"]
    assert rows(tmp_path)[-1]["layers"] == rows(tmp_path)[0]["layers"]


def test_a_launch_whose_ranks_all_died_meanwhile_is_lost_in_time(coordinator, tmp_path, monkeypatch):
    coordinator.open_run(launch("a"))
    again = restarted(tmp_path)
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.LOST_SECONDS", -1.0)
    assert running(again) == [("run", 0)], "its couriers may be on their way"
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.AWAITED_SECONDS", -1.0)
    again = restarted(tmp_path)
    assert running(again) == []
    assert story(tmp_path)[-1] == (0, "a", "lost")
    assert again.ended() == [("run", 0)]
    assert running(restarted(tmp_path)) == []


def record_of(store: Path, captured_at: datetime, attempt: int = 0, run_id: str = "run") -> None:
    """A record as a shard writes it."""
    now = datetime.now(UTC)
    row = {field.name: None if field.nullable else 0 for field in RECORDS}
    row |= {"site": "post", "form": "scatter", "attempt": attempt, "captured_at": captured_at, "written_at": now}
    StoreWriter(store).append("records", run_id, [row | {"finite": True, "complete": True}])


def test_a_launch_of_another_aggregator_on_the_store_is_left_to_that(coordinator, tmp_path, monkeypatch):
    coordinator.open_run(launch("a"))
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.AWAITED_SECONDS", -1.0)
    other = restarted(tmp_path)  # as an embedded aggregator of another job starts
    assert running(other) == []
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.LOST_SECONDS", 5.0)
    for one in other._launches.values():
        one.heard_at -= 100.0  # it was told nothing for long
    record_of(tmp_path, datetime.now(UTC))
    assert running(other) == []
    assert story(tmp_path) == [(0, "a", "running")]
    assert coordinator.heartbeat("run", 0, 0, {})


def test_a_launch_ends_with_its_last_rank_though_the_others_ended_before_a_restart(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    coordinator.open_run(launch("x", run_id="other"))
    coordinator.finish("run", 0, 1, True, {})
    coordinator.finish("other", 0, 0, False, {})
    coordinator.running()
    again = restarted(tmp_path)
    again.finish("run", 0, 0, True, {})
    again.finish("other", 0, 1, True, {})
    assert running(again) == []
    assert [story(tmp_path, run_id)[-1][2] for run_id in ("run", "other")] == ["finished", "lost"]


def test_a_damaged_row_of_one_run_does_not_stop_the_others(coordinator, tmp_path, caplog):
    coordinator.open_run(launch("a"))
    coordinator.open_run(launch("x", run_id="other"))
    next(table_folder(tmp_path, "run", "runs").glob("part-*")).write_bytes(b"PAR1 and no more")
    (tmp_path / "run_id=..odd" / "runs").mkdir(parents=True)
    again = restarted(tmp_path)
    assert running(again) == [("other", 0)]
    assert "run run: what was under way is not known" in caplog.text


COUNTED = {"s1": {"run": RunCounters(10, 1, 5, (("late", 2),))}, "s2": {"run": RunCounters(7, 0, 4)}}


def earlier(coordinator: Coordinator, counted: dict[str, Any]) -> RunCounters:
    (state,) = coordinator.running(counted)
    return state.earlier


def test_what_a_shard_had_counted_before_it_died_stays_counted(coordinator):
    coordinator.open_run(launch("a"))
    assert earlier(coordinator, COUNTED) == RunCounters()
    after = {"s1-again": {"run": RunCounters(1)}, "s2": COUNTED["s2"]}
    assert earlier(coordinator, after) == COUNTED["s1"]["run"]
    assert earlier(coordinator, after) == COUNTED["s1"]["run"], "once"
    twice = {"s1-once-more": {}, "s2": COUNTED["s2"]}
    assert earlier(coordinator, twice) == RunCounters(11, 1, 5, (("late", 2),))
    finish(coordinator)
    coordinator.open_run(launch("b"))
    assert earlier(coordinator, twice) == RunCounters(), "another launch of the run begins anew"


def test_what_a_shard_forgot_with_a_launch_that_is_opened_again_stays_counted(coordinator):
    coordinator.open_run(launch("a"))
    assert earlier(coordinator, COUNTED) == RunCounters()
    finish(coordinator)
    coordinator.open_run(launch("a"))
    forgotten = {"s1": {}, "s2": COUNTED["s2"]}
    assert earlier(coordinator, forgotten) == COUNTED["s1"]["run"]
    again = {"s1": {"run": RunCounters(1)}, "s2": COUNTED["s2"]}
    assert earlier(coordinator, again) == COUNTED["s1"]["run"], "once"


def test_counters_survive_the_coordinator_and_everything_else(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    coordinator.heartbeat("run", 0, 1, {"outbox_full": 3})
    coordinator.running(COUNTED)
    coordinator.close(COUNTED)
    alone = restarted(tmp_path)
    assert earlier(alone, COUNTED) == RunCounters(), "the shards are the same"
    all_new = restarted(tmp_path)
    assert earlier(all_new, {"s3": {}}) == RunCounters(17, 1, 9, (("late", 2),))
    (state,) = all_new.running({"s3": {}})
    assert state.dropped == {"outbox_full": 3}
    all_new.heartbeat("run", 0, 1, {"outbox_full": 4})
    assert all_new.running({"s3": {}})[0].dropped == {"outbox_full": 4}
    all_new.close({"s3": {}})
    assert rows(tmp_path)[-1]["dropped"] == [("late", 2), ("outbox_full", 4)]


def test_what_a_shard_and_the_coordinator_knew_that_died_together_is_known_by_who_asks(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    coordinator.running({"s1": {"run": RunCounters(4)}})
    coordinator.close({"s1": {"run": RunCounters(4)}})
    again, after = restarted(tmp_path), {"s1-again": {"run": RunCounters(1)}}
    for before in (COUNTED, after):
        (state,) = again.running(after, before)
        assert state.earlier == RunCounters(17, 1, 9, (("late", 2),))


def test_a_row_says_what_was_counted_once_a_minute_and_at_the_end(coordinator, tmp_path, monkeypatch):
    coordinator.open_run(launch("x", run_id="other"))
    for received in range(5):
        coordinator.running({"s1": {"other": RunCounters(received)}})
    assert len(rows(tmp_path, "other")) == 1
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.COUNTERS_SECONDS", 0.0)
    coordinator.open_run(launch("a"))
    for received in (5, 5, 5, 6):
        coordinator.running({"s1": {"run": RunCounters(received)}})
    assert [row["counters"][0]["received"] if row["counters"] else 0 for row in rows(tmp_path)] == [0, 5, 6]
    coordinator.heartbeat("run", 0, 0, {"spool_error": 1})
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.COUNTERS_SECONDS", 60.0)
    coordinator.running(COUNTED)
    finish(coordinator)
    last = rows(tmp_path)[-1]
    assert (last["status"], last["run_id_in_use"]) == ("finished", False)
    sql = "SELECT status, dropped['late'] AS late, len(counters) AS shards FROM runs WHERE run_id = 'run'"
    with open_history(tmp_path) as history:
        (seen,) = history.query(sql).to_pylist()
    assert seen == {"status": "finished", "late": 2, "shards": 2}


def test_a_run_id_that_two_jobs_use_at_once_is_told(coordinator, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("eigenwatch.aggregator.coordinator.LOOK_SECONDS", 0.0)
    coordinator.open_run(launch("a"))
    coordinator.open_run(launch("b"))
    now = datetime.now(UTC)
    for captured_at in (now - timedelta(days=1), now + timedelta(seconds=30)):
        record_of(tmp_path, captured_at)  # what the first left, delivered late, and by a clock that is fast
    record_of(tmp_path, now + timedelta(seconds=90), attempt=1)

    def told() -> list[bool]:
        assert coordinator.heartbeat("run", 0, 0, {})
        return [one.in_use for one in coordinator.running()]

    assert told() == [False]
    record_of(tmp_path, now + timedelta(seconds=90))
    assert told() == told() == told() == [True]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["run_id_in_use"]
    assert running(coordinator) == [("run", 1)]
    assert [(row["attempt"], row["run_id_in_use"]) for row in rows(tmp_path)[-2:]] == [(0, True), (1, True)]
    again = restarted(tmp_path)
    assert [one.in_use for one in again.running()] == [True]
    finish(coordinator, 0)
    assert [one.in_use for one in coordinator.running()] == [False]
    assert coordinator.open_run(launch("a")).attempt == 0, "nobody is refused"


def test_two_aggregators_on_one_store_see_that_their_jobs_use_one_run_id(coordinator, tmp_path):
    other = restarted(tmp_path)
    coordinator.open_run(launch("a"))
    assert other.open_run(launch("b")).attempt == 1
    record_of(tmp_path, datetime.now(UTC) + timedelta(seconds=90))
    assert [one.in_use for one in other.running()] == [True]
    assert story(tmp_path) == [(0, "a", "running"), (1, "b", "running"), (1, "b", "running")]


def test_a_courier_hears_with_its_heartbeat_that_layers_have_other_owners(coordinator):
    both = {name: f"{name}, first" for name in SHARDS}
    coordinator.set_shards(both, {})
    opened = coordinator.open_run(launch("a"))
    assert coordinator.heartbeat("run", 0, 0, {}, opened.epoch) == 1
    coordinator.set_shards(dict(both), {"run": 4})
    assert coordinator.heartbeat("run", 0, 0, {}, opened.epoch) == 4, "nothing but the stretch has changed"
    coordinator.set_shards({SHARDS[0]: both[SHARDS[0]]}, {})
    assert coordinator.heartbeat("run", 0, 0, {}, opened.epoch) == OPEN_AGAIN
    again = coordinator.open_run(launch("a"))
    assert again.attempt == opened.attempt
    assert again.epoch > opened.epoch
    assert (set(again.owners.values()), again.shards) == ({SHARDS[0]}, [SHARDS[0]])
    assert coordinator.heartbeat("run", 0, 0, {}, again.epoch) == 1
    coordinator.set_shards({SHARDS[0]: "second"}, {})
    assert coordinator.heartbeat("run", 0, 0, {}, again.epoch) == OPEN_AGAIN, "it started again, and knows no launch"


def test_a_launch_whose_leftovers_come_after_its_end_keeps_what_was_counted_and_how_it_ended(coordinator, tmp_path):
    coordinator.open_run(launch("a"))
    coordinator.heartbeat("run", 0, 0, {"outbox_full": 12})
    (running_row,) = [row for row in rows(tmp_path) if row["status"] == "running"][:1]
    finish(coordinator, clean=False)
    assert rows(tmp_path)[-1]["status"] == "lost"
    coordinator.open_run(launch("a"))
    coordinator.heartbeat("run", 0, 0, {})
    finish(coordinator, clean=True)
    last = rows(tmp_path)[-1]
    assert (last["status"], last["dropped"]) == ("lost", [("outbox_full", 12)])
    assert last["started_at"] == running_row["started_at"]


def test_the_ownership_of_a_coordinator_that_starts_again_is_newer(coordinator, tmp_path):
    before = coordinator.open_run(launch("a")).epoch
    assert Coordinator(str(tmp_path), list(SHARDS)).open_run(launch("a")).epoch > before
