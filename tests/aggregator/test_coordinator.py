"""The coordinator: one attempt a launch, one row for whatever becomes of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from eigenwatch.aggregator.coordinator import Coordinator
from eigenwatch.schemas import LayerDescription, RunDescription, table_folder

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
    assert not again.heartbeat("run", 1, 0, {})
    assert again.open_run(launch("b")) == coordinator.open_run(launch("b"))
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
    opened, closed = rows(tmp_path)
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
    assert coordinator.running()[0].dropped == {"outbox_full": 7}


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
