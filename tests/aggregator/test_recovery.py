"""A shard that starts again on a store goes on where another left, at whatever point that died."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.recovery import series_memory, stored_alerts
from eigenwatch.aggregator.shard import Shard
from eigenwatch.schemas import COLLAPSE, PartialCovariance, RunDescription, table_folder
from eigenwatch.schemas.store import open_store

from tests.aggregator.test_shard import FLUSH_SECONDS, KEY, broken, layer, partial, run, stored
from tests.spectrum.cases import partial_of

WINDOW, WIDTH = COLLAPSE.window_samples, 64
RUN = run(layer(ranks=(0,), width=WIDTH), layer(1, ranks=(0,), width=WIDTH))
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))


def sample(step: int, collapsed: bool, index: int = 0) -> PartialCovariance:
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(300, WIDTH, generator=generator)
    x_ND = noise + 100 * torch.randn(300, 1, generator=generator) * DIRECTION if collapsed else noise
    return partial_of(x_ND, key=KEY._replace(step=step, layer=index))


class Store:
    """A store on which one shard after another works."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shard: Shard | None = None

    def restart(self, described: RunDescription = RUN) -> Shard:
        self.close()
        self.shard = Shard(str(self.folder), SolverConfig(device="cpu"), ShardLimits())
        self.shard.open_run(described.to_wire(), 0)
        return self.shard

    def push(self, *partials: PartialCovariance) -> None:
        assert self.shard is not None
        for one in partials:
            assert self.shard.push(*one.to_wire()).status == "merged"
            self.shard.flush(FLUSH_SECONDS)

    def alerts(self) -> list[tuple[int, str]]:
        return [(row["step"], row["state"]) for row in stored(self.folder, "alerts")]

    def active(self) -> list[bool]:
        assert self.shard is not None
        return [one.firing for one in self.shard.snapshot([]).alerts]

    def close(self) -> None:
        if self.shard is not None:
            self.shard.close(FLUSH_SECONDS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


@pytest.mark.parametrize("restarts_at", range(1, 7))
def test_alerts_are_the_same_wherever_the_shard_restarts(store, restarts_at):
    store.restart()
    for step in range(2 * WINDOW + 1):
        if step == restarts_at:
            before = store.active()
            store.restart()
            assert store.active() == before, "at once"
        store.push(sample(step, collapsed=step < WINDOW))
    assert store.alerts() == [(WINDOW - 1, "firing"), (2 * WINDOW - 1, "resolved")]
    firing, resolved = stored(store.folder, "alerts")
    assert firing["alert_id"] == resolved["alert_id"]
    assert firing["evidence_steps"] == list(range(WINDOW))


def cut_off(store: Store, *tables: str) -> None:
    """Takes away the newest file of these tables, as if the crash had come before it."""
    for table in tables:
        max(table_folder(store.folder, "run", table).glob("part-*.parquet")).unlink()


@pytest.mark.parametrize("tables", [("records",), ("records", "alerts")])
def test_an_alert_that_the_crash_cut_off_is_raised_once(store, tables):
    store.restart()
    store.push(*(sample(step, collapsed=True) for step in range(WINDOW)))
    assert store.active() == [True], "before anything of it need be durable"
    store.close()
    cut_off(store, *tables)
    store.restart()
    assert store.active() == ([True] if tables == ("records",) else [])
    store.push(sample(WINDOW - 1, collapsed=True), sample(WINDOW, collapsed=True))
    assert store.alerts() == [(WINDOW - 1, "firing")]
    assert store.active() == [True]


def test_gauges_are_back_before_the_next_sample(store):
    store.restart()
    store.push(sample(0, False), sample(5, False), sample(3, False, index=1), sample(2, False))
    before = {one.series: (one.step, one.values) for one in store.shard.snapshot([]).latest}
    assert {series.layer: step for series, (step, _) in before.items()} == {0: 5, 1: 3}
    after = {one.series: (one.step, one.values) for one in store.restart().snapshot([]).latest}
    assert after == before
    store.push(sample(4, False))
    assert {one.series.layer: one.step for one in store.shard.snapshot([]).latest} == {0: 5, 1: 3}


def test_the_newest_of_each_series_is_remembered_and_of_each_step_the_newest_revision(tmp_path):
    described = run(layer(), layer(expert=3, ranks=(0,)), layer(site="pre", ranks=(0,)))
    shard = Shard(str(tmp_path), SolverConfig(device="cpu"), ShardLimits())
    shard.open_run(described.to_wire(), 0)
    for step in (1, 2, 3, 4):
        shard.push(*partial(0, step=step).to_wire())
    shard.flush(FLUSH_SECONDS)
    for one in (partial(1, step=3), broken(0, step=5), partial(0, step=7, expert=3), partial(0, step=2, site="pre")):
        shard.push(*one.to_wire())
    shard.close(FLUSH_SECONDS)
    memory = series_memory(open_store(tmp_path), "run", 0, samples=3)
    found = {(key.site, key.expert): (one.latest["step"], steps(one.judged)) for key, one in memory.items()}
    assert found == {("post", None): (5, [2, 3, 4, 5]), ("post", 3): (7, [7]), ("pre", None): (2, [2])}
    of_both_ranks = [row["hard_rank"] for row in stored(tmp_path) if row["step"] == 3 and row["ranks_seen"] == 2]
    assert [memory[KEY.series].judged[1]["hard_rank"]] == of_both_ranks
    assert (
        series_memory(open_store(tmp_path), "run", 1, samples=3)
        == series_memory(open_store(tmp_path), "other", 0, samples=3)
        == {}
    )
    (alert,) = stored_alerts(open_store(tmp_path), "run", 0).values()
    assert (alert["kind"], alert["state"], alert["since_step"]) == ("non_finite", "firing", 5)


def steps(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


def test_a_damaged_file_of_alerts_does_not_keep_a_launch_from_going_on(store, caplog):
    store.restart()
    store.push(*(sample(step, collapsed=True) for step in range(WINDOW)))
    for file in table_folder(store.folder, "run", "alerts").iterdir():
        file.write_bytes(b"PAR1 and no more")
    store.restart()
    assert "alerts start anew" in caplog.text
    shutil.rmtree(table_folder(store.folder, "run", "alerts"))
    store.push(*(sample(step, collapsed=True) for step in range(WINDOW, 2 * WINDOW)))
    assert store.active() == [True]


def test_another_attempt_starts_with_nothing(store):
    store.restart()
    store.push(*(sample(step, collapsed=True) for step in range(WINDOW)))
    shard = store.restart()
    shard.open_run(RUN.to_wire(), 1)
    header, mean, scatter = sample(0, collapsed=True).to_wire()
    assert shard.push(header | {"attempt": 1}, mean, scatter).status == "merged"
    shard.flush(FLUSH_SECONDS)
    assert [one.series.attempt for one in shard.snapshot([]).alerts] == [0]
